"""16-bit products in float32: those of exact numbers rounded once, whatever is made at a time, and with weights in blocks."""

from __future__ import annotations

import pytest
import torch

from moacompress.kernels import widened_products as module
from moacompress.kernels.block_products import block_linear
from moacompress.kernels.weight_blocks import WEIGHT_TYPES, dequantized
from moacompress.kernels.widened_products import WIDENED, is_widened, widened_linear
from moacompress.runtime import linear as layers
from moacompress.runtime import use_kernels
from tests.weight_blocks import random_blocks

NARROW = (torch.bfloat16, torch.float16)


@pytest.fixture
def widened(monkeypatch):
    """A processor without instructions for 16-bit numbers."""
    monkeypatch.setattr(module, "WIDENED", frozenset(NARROW))


@pytest.mark.parametrize(
    ("dtype", "bias", "numbers"), [(NARROW[0], True, 1), (NARROW[1], False, 100), (NARROW[0], False, 1 << 20)]
)
def test_a_product_is_rounded_once(dtype, bias, numbers, monkeypatch):
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", numbers)
    x, weight = torch.randn(2, 5, 48).to(dtype), torch.randn(31, 48).to(dtype)
    added = torch.randn(31).to(dtype) if bias else None
    exact = x.double() @ weight.double().T + (0 if added is None else added.double())
    for stored in (weight, weight.T.contiguous().T):
        found = widened_linear(x, stored, added)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.usefixtures("widened")
def test_only_16_bit_numbers_on_a_processor():
    assert [is_widened(torch.zeros(1, dtype=dtype)) for dtype in (*NARROW, torch.float32)] == [True, True, False]
    assert not is_widened(torch.zeros(1, dtype=torch.bfloat16, device="meta"))


def test_what_is_widened_is_what_onednn_does_not_take():
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported() if torch.backends.mkldnn.is_available() else False
    assert (torch.bfloat16 in WIDENED) != supported


@pytest.mark.usefixtures("widened")
@pytest.mark.parametrize("amd", [False, torch.backends.mkldnn.is_available()])
@pytest.mark.parametrize("dtype", NARROW)
def test_layers_and_their_gradients(dtype, amd, monkeypatch):
    monkeypatch.setattr(layers, "ON_AMD", amd)
    layer = torch.nn.Linear(48, 31, dtype=dtype).requires_grad_(False)
    x, cotangent = torch.randn(130, 48).to(dtype), torch.randn(130, 31).to(dtype)
    expected = layer.double()(x.double())
    layer.to(dtype)
    gradient = cotangent.double() @ layer.weight.double()
    use_kernels(layer)
    seen = []
    monkeypatch.setattr(layers, "widened_linear", lambda *given: seen.append(given) or widened_linear(*given))
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-3}
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), expected, **tolerance)
    x.requires_grad_()
    found = layer(x)
    torch.testing.assert_close(found.double(), expected, **tolerance)
    (given,) = torch.autograd.grad(found, x, cotangent)
    torch.testing.assert_close(given.double(), gradient, **tolerance)
    assert len(seen) == 3


@pytest.mark.usefixtures("widened")
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_weights_in_blocks(dtype, kind):
    blocks_of = WEIGHT_TYPES[kind]
    blocks = random_blocks(blocks_of, 31, inputs=256)
    x, bias = torch.randn(20, 256).to(dtype).requires_grad_(), torch.randn(31).to(dtype)
    weight = dequantized(blocks, blocks_of, torch.float64)
    found = block_linear(x, blocks, blocks_of, bias)
    expected = x.double() @ weight.T + bias.double()
    scale = expected.abs().max()
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= torch.finfo(dtype).eps * scale
    cotangent = torch.randn(20, 31).to(dtype)
    (given,) = torch.autograd.grad(found, x, cotangent)
    wanted = cotangent.double() @ weight
    assert (given - wanted).abs().max() <= torch.finfo(dtype).eps * wanted.abs().max()
