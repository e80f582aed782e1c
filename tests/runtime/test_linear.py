"""Packed weights: the same products and gradients, and nothing stale."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moacompress.kernels.dispatch import few_rows
from moacompress.models.source import model_shape
from moacompress.runtime import attach, detach
from moacompress.runtime.linear import (
    PackedLinear,
    can_pack,
    pack_weights,
    pack_where_it_fits,
    packed_bytes,
)

pytestmark = pytest.mark.skipif(not can_pack(), reason="oneDNN is not there")


def linear(inputs=24, outputs=40, bias=True, dtype=torch.float32):
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1,), (7,), (2, 3), (1, 0), (130,)])
def test_products_are_those_of_the_plain_layer(dtype, bias, size):
    layer = linear(bias=bias, dtype=dtype)
    x = torch.randn(*size, 24).to(dtype)
    expected = layer(x)
    assert pack_weights(layer) == layer.weight.nbytes
    assert type(layer) is PackedLinear
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(layer(x), expected, atol=tolerance, rtol=tolerance)
    strided = torch.randn(24, 5).to(dtype).t()
    torch.testing.assert_close(
        layer(strided), nn.functional.linear(strided, layer.weight, layer.bias), atol=1e-2, rtol=2e-2
    )


def test_gradients_of_the_input():
    layer = linear()
    x = torch.randn(2, 5, 24, requires_grad=True)
    cotangent = torch.randn(2, 5, 40)
    (expected,) = torch.autograd.grad(layer(x), x, cotangent)
    pack_weights(layer)
    (found,) = torch.autograd.grad(layer(x), x, cotangent)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_weight_that_is_trained_has_its_gradient():
    layer = nn.Linear(8, 4)
    pack_weights(layer)
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.weight.mul_(2.0),
        lambda layer: setattr(layer.weight, "data", torch.randn(40, 24)),
        lambda layer: layer.to(torch.bfloat16),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(40, 24), requires_grad=False)),
    ],
)
def test_a_changed_weight_is_never_stale(change):
    layer = linear()
    pack_weights(layer)
    change(layer)
    x = torch.randn(few_rows(layer.weight) + 1, 24).to(layer.weight.dtype)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), expected)
    torch.testing.assert_close(layer(x[:3]), expected[:3], atol=1e-2, rtol=2e-2)
    pack_weights(layer)
    torch.testing.assert_close(layer(x), expected, atol=1e-2, rtol=2e-2)


def test_copies_and_pickles_are_right():
    layer = linear()
    pack_weights(layer)
    x = torch.randn(3, 24)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            other.weight.zero_()
        assert torch.equal(other(x), layer.bias.expand(3, -1))
    assert not torch.equal(layer(x), layer.bias.expand(3, -1))
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_copies_of_a_compiled_layer_are_of_the_layer():
    layer = linear()
    pack_weights(layer)
    layer.compile(backend="eager")
    x = torch.randn(3, 24)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            other.weight.zero_()
        assert torch.equal(other(x), layer.bias.expand(3, -1))


def test_a_model_and_its_twin_share_packed_weights(tiny_model, tmp_path):
    model = tiny_model().requires_grad_(False)
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    ids = torch.randint(0, model.config.vocab_size, (1, 9))
    expected = model(ids).logits
    names = set(model.state_dict())
    weights = {id(layer.weight): layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)}
    taken = pack_weights(model, twin)
    assert taken == sum(weight.nbytes for weight in weights.values())
    assert model.lm_head._pack is twin.lm_head._pack
    for one in (model, twin):
        torch.testing.assert_close(one(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, expected, atol=1e-6, rtol=1e-6)


def test_a_compiled_layer_is_one_graph():
    layer = linear()
    x = torch.randn(3, 24)
    expected = layer(x)
    pack_weights(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)
    y = x.clone().requires_grad_()
    compiled(y).sum().backward()
    torch.testing.assert_close(y.grad, layer.weight.sum(0).expand(3, -1), atol=1e-5, rtol=1e-5)


class Operators(TorchDispatchMode):
    """Takes note of what is called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("few", [1, 0.5, 0, -1])
def test_a_few_rows_without_gradients_are_for_the_kernels(dtype, few, use_backend):
    """One row, half of those that are few, all of these, and one more."""
    most = few_rows(torch.zeros(1, dtype=dtype))
    rows = 1 if few == 1 else most - int(few * most) if few >= 0 else most + 1
    layer = linear(dtype=dtype)
    pack_weights(layer)
    x = torch.randn(rows, 1, 24, dtype=dtype)

    def kernels_run(x):
        with Operators() as seen:
            layer(x)
        return "moacompress_cpu::linear" in seen.names

    assert kernels_run(x) == (rows <= most)
    assert not kernels_run(x.clone().requires_grad_())
    use_backend("reference")
    assert not kernels_run(x)


def test_nothing_is_packed_without_room():
    layer = linear()
    assert pack_where_it_fits(layer, lambda: 3 * layer.weight.nbytes - 1) == 0
    assert type(layer) is nn.Linear
    assert pack_where_it_fits(layer, lambda: 10**12) == layer.weight.nbytes


def test_other_layers_are_left_alone():
    class Other(nn.Linear):
        pass

    layer = Other(4, 4)
    assert pack_weights(layer, linear(dtype=torch.float16)) == 0
    assert type(layer) is Other


def test_packed_bytes(tiny_model):
    model = tiny_model().requires_grad_(False)
    assert packed_bytes(model) == 0
    taken = pack_weights(model)
    assert packed_bytes(model) == taken > 0


def test_the_head_of_a_model_under_a_plan_takes_few_rows_from_the_kernels(tiny_model, random_plan):
    model = tiny_model("llama").eval()
    head, x = model.lm_head, torch.randn(2, 1, model.config.hidden_size)
    with torch.no_grad():
        expected = head(x)
        plan = random_plan(model_shape(model), 3)
        attach(model, plan)
        assert type(head) is PackedLinear
        assert packed_bytes(model) == 0
        assert (head(x) - expected).abs().max() < 1e-5
        assert torch.equal(head(x.repeat(9, 1, 1)), nn.functional.linear(x.repeat(9, 1, 1), head.weight))
    detach(model)
    assert type(head) is nn.Linear
    attach(model, plan)
    pack_weights(model)
    detach(model)
    assert type(head) is PackedLinear  # its weight is packed
    with torch.no_grad():
        assert (head(x) - expected).abs().max() < 1e-5
