"""Weights in GGML's blocks: the numbers are those of the package `gguf`, and products have the reference's gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from moacompress.core.errors import UnsupportedError
from moacompress.kernels.dispatch import REFERENCE
from moacompress.kernels.weight_blocks import WEIGHT_TYPES, dequantized, weight_type

gguf = pytest.importorskip("gguf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def test_the_types_are_those_of_gguf():
    for name, kind in WEIGHT_TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (kind.numbers, kind.nbytes)
        assert weight_type(kind.code) is kind
        assert kind.inputs(kind.row_bytes(6 * kind.numbers)) == 6 * kind.numbers
    assert {name: kind.code for name, kind in WEIGHT_TYPES.items()} == {
        "Q8_0": 1,
        "Q5_0": 2,
        "Q4_1": 3,
        "Q4_0": 4,
        "Q4_K": 5,
        "Q6_K": 6,
        "Q5_K": 7,
    }


@pytest.mark.parametrize("kind", WEIGHT_TYPES.values(), ids=WEIGHT_TYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5)])
def test_numbers_are_those_of_gguf(kind, shape, random_blocks):
    blocks = random_blocks(kind, *shape, inputs=768)
    expected = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind.name])
    assert np.isfinite(expected).all()
    assert np.unique(expected).size > 64
    for dtype in DTYPES:
        found = dequantized(blocks, kind, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, torch.from_numpy(expected).to(dtype))


@pytest.mark.parametrize("kind", WEIGHT_TYPES.values(), ids=WEIGHT_TYPES)
def test_the_reference_multiplies_what_is_dequantized(kind, random_blocks, monkeypatch):
    monkeypatch.setattr("moacompress.kernels.block_products.NUMBERS_AT_ONCE", 2 * 512)  # of two outputs
    blocks = random_blocks(kind, 7, inputs=512)
    x = torch.randn(2, 3, 512, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    found = REFERENCE.linear_blocks(x, blocks, kind, bias)
    expected = linear(x, dequantized(blocks, kind, torch.float64), bias)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    along = torch.randn_like(expected)
    for mine, wanted in zip(*(torch.autograd.grad(y, (x, bias), along) for y in (found, expected)), strict=True):
        assert torch.allclose(mine, wanted, rtol=1e-12, atol=1e-12)


def test_gradients_keep_no_dense_weight(random_blocks):
    kind = WEIGHT_TYPES["Q4_1"]
    blocks = random_blocks(kind, 50, inputs=320)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        REFERENCE.linear_blocks(torch.randn(3, 320, requires_grad=True), blocks, kind, None)
    assert sum(t.nbytes for t in saved) == blocks.nbytes


def test_refusals(random_blocks):
    kind = WEIGHT_TYPES["Q4_K"]
    blocks = random_blocks(kind, 4, inputs=512)
    with pytest.raises(UnsupportedError, match="320 inputs are no multiple of the 256 numbers of a Q4_K block"):
        kind.row_bytes(320)
    with pytest.raises(UnsupportedError, match="no type of weight blocks has the code 99; known are 1 to 7"):
        weight_type(99)
    with pytest.raises(UnsupportedError, match="uint8"):
        dequantized(blocks.float(), kind)
    with pytest.raises(UnsupportedError, match=r"a Q4_K weight of 256 inputs has 144 bytes a row, not 288"):
        REFERENCE.linear_blocks(torch.randn(2, 256), blocks, kind, None)
