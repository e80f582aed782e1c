"""Layers with weights in blocks: products, rows and gradients are those of the numbers, and nothing touches the bytes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad as fwAD
from torch.nn.functional import embedding, linear

from moacompress.core.errors import ModelError, UnsupportedError
from moacompress.kernels.weight_blocks import WEIGHT_TYPES, dequantized
from moacompress.models.block_layers import BlockEmbedding, BlockLinear, put_block_layer, put_block_layers, weight_types
from tests.weight_blocks import random_blocks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


KINDS = [*WEIGHT_TYPES.values()]
every_kind = pytest.mark.parametrize(
    ("kind", "dtype"), [(kind, DTYPES[i % 3]) for i, kind in enumerate(KINDS)], ids=WEIGHT_TYPES
)
"""A dtype for each type of blocks: products of all pairs are in `tests/kernels/test_linear.py`."""
Q4_K = WEIGHT_TYPES["Q4_K"]


def block_linear(kind, inputs=512, outputs=48, bias=True):
    layer = BlockLinear(inputs, outputs, kind, bias=bias)
    layer.weight.copy_(random_blocks(kind, outputs, inputs=inputs, scale=1e-3))
    if bias:
        layer.bias.data.normal_()
    return layer


@every_kind
@pytest.mark.parametrize("shape", [(1,), (3, 40)])
def test_products_and_gradients_are_those_of_the_numbers(kind, dtype, shape):
    layer = block_linear(kind).to(dtype)
    weight = dequantized(layer.weight, kind, torch.float64)
    x = torch.randn(*shape, 512).to(dtype).requires_grad_()
    expected = linear(x.double(), weight, layer.bias.double())
    with torch.no_grad():
        alone = layer(x)
    for found in (alone, layer(x)):
        assert found.dtype == dtype
        assert float((found - expected).abs().max()) <= CLOSE[dtype] * float(expected.abs().max())
    along = torch.randn(expected.shape)
    (mine,) = torch.autograd.grad(layer(x), x, along.to(dtype))
    (wanted,) = torch.autograd.grad(expected, x, along.double())
    assert float((mine - wanted).abs().max()) <= CLOSE[dtype] * float(wanted.abs().max())
    layer.bias.requires_grad_()
    (mine,) = torch.autograd.grad(layer(x), layer.bias, along.to(dtype))
    assert torch.allclose(mine.float(), along.to(dtype).float().flatten(0, -2).sum(0), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 200), (torch.bfloat16, 2)])
def test_derivatives_of_function_transforms_are_those_of_the_numbers(dtype, rows):
    kind, layer = Q4_K, block_linear(Q4_K).to(dtype)
    x, tangent = torch.randn(rows, 512).to(dtype), torch.randn(rows, 512).to(dtype)
    weight = dequantized(layer.weight, kind, torch.float64)
    expected = tangent.double() @ weight.t()
    assert expected.abs().max() > 0.1
    with fwAD.dual_level():
        dual = fwAD.unpack_dual(layer(fwAD.make_dual(x, tangent))).tangent
    for found in (torch.func.jvp(layer, (x,), (tangent,))[1], dual):
        assert float((found - expected).abs().max()) <= CLOSE[dtype] * float(expected.abs().max())
    found = torch.func.grad(lambda x: layer(x).sum())(x)
    expected = weight.sum(0).expand(rows, -1)
    assert float((found - expected).abs().max()) <= CLOSE[dtype] * float(expected.abs().max())


@every_kind
def test_rows_are_those_of_the_numbers(kind, dtype):
    layer = BlockEmbedding(20, 256, kind, dtype=dtype, scale=16.1)
    layer.weight.copy_(random_blocks(kind, 20, inputs=256, scale=1e-3))
    ids = torch.tensor([[3, 3, 0], [19, 7, 1]])
    expected = embedding(ids, dequantized(layer.weight, kind, dtype)) * torch.tensor(16.1, dtype=dtype)
    assert torch.equal(layer(ids), expected)
    assert layer(ids[:0]).shape == (0, 3, 256)
    assert layer.half()(ids).dtype == torch.float16
    assert layer.state_dict().keys() == {"weight"}


def test_dtypes_never_touch_the_bytes():
    layer = block_linear(Q4_K)
    before = layer.weight.clone()
    for change in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float):
        change(layer)
        assert torch.equal(layer.weight, before)
        assert layer(torch.randn(2, 512).to(layer.bias.dtype)).dtype == layer.bias.dtype
    layer.to(torch.bfloat16).train().requires_grad_(False)
    assert torch.equal(layer.weight, before)
    assert layer.weight.shape == (48, Q4_K.row_bytes(512))
    assert "kind=Q4_K" in repr(layer)


def test_copies_compute_the_same():
    layer, x = block_linear(Q4_K), torch.randn(3, 512)
    for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(made(x), layer(x))
        assert made.weight is not layer.weight
    other = block_linear(Q4_K)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == nn.Linear(512, 2)(x).dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [1, 40])
def test_a_graph_holds_it_whole(rows):
    torch._dynamo.reset()
    layer, x = block_linear(Q4_K), torch.randn(rows, 512)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(x), layer(x), atol=1e-5)
    y = x.clone().requires_grad_()
    compiled(y).sum().backward()
    (expected,) = torch.autograd.grad(layer(x.requires_grad_()).sum(), x)
    assert torch.allclose(y.grad, expected, atol=1e-5)
    torch._dynamo.reset()


def test_what_cannot_be_in_blocks_is_refused():
    model = nn.ModuleDict({"wide": nn.Linear(64, 8), "odd": nn.Linear(48, 8), "norm": nn.LayerNorm(64)})
    for types, message in (
        ({"none": "Q8_0"}, r"layer 'none' is not known"),
        ({"wide": "Q9_9"}, r"type of weights 'Q9_9' is not known; types are Q8_0"),
        ({"wide": "Q4_K"}, r"rows of 64 numbers are no whole Q4_K blocks of 256"),
        ({"norm": "Q8_0"}, r"LayerNorm is no plain linear layer or embedding"),
    ):
        with pytest.raises(ModelError, match=message):
            put_block_layers(model, {"wide": "Q8_0", **types} if "wide" not in types else types)
        assert not weight_types(model)
    with pytest.raises(UnsupportedError, match=r"blocks of wide are uint8 \[8, 68\], not torch.uint8 \[8, 34\]"):
        put_block_layer(model, "wide", WEIGHT_TYPES["Q8_0"], torch.zeros(8, 34, dtype=torch.uint8))
    put_block_layers(model, {"wide": "Q8_0"})
    assert weight_types(model) == {"wide": "Q8_0"}
