"""Linear layers by the quickest products: those of the plain layer, its gradients, and no copy of a weight."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from moacompress.kernels.dispatch import few_rows
from moacompress.models.source import model_shape
from moacompress.runtime import attach, detach, use_kernels
from moacompress.runtime import linear as module
from moacompress.runtime.linear import KernelLinear
from moacompress.runtime.sharing.projections import PartProjection


def linear(inputs=24, outputs=40, bias=True, dtype=torch.float32):
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype).eval().requires_grad_(False)


def assert_plain(layer, x, atol=1e-5, rtol=1e-5):
    """A layer gives what the plain product with its weight does."""
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=atol, rtol=rtol)


@pytest.fixture(params=[False, True], ids=["MKL", "oneDNN"])
def onednn(request, monkeypatch):
    """Whether this processor is one whose products in float32 are oneDNN's."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(module, "ON_AMD", request.param)
    return request.param


class Operators(TorchDispatchMode):
    """Takes note of what is called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


def called(layer, x):
    with Operators() as seen:
        layer(x)
    return seen.names


@pytest.mark.parametrize(
    ("dtype", "bias", "size"),
    [
        (torch.float32, True, (1,)),
        (torch.float32, False, (2, 3)),
        (torch.float32, True, (130,)),
        (torch.bfloat16, True, (1, 0)),
        (torch.bfloat16, False, (130,)),
        (torch.bfloat16, True, (7,)),
    ],
)
def test_products_are_those_of_the_plain_layer(dtype, bias, size, onednn):
    layer = linear(bias=bias, dtype=dtype)
    x = torch.randn(*size, 24).to(dtype)
    expected = layer(x)
    assert use_kernels(layer) == 1
    assert use_kernels(layer) == 0
    assert type(layer) is KernelLinear
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(layer(x), expected, atol=tolerance, rtol=tolerance)
    assert_plain(layer, torch.randn(24, 130).to(dtype).t(), 1e-2, 2e-2)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("graph", [False, True])
def test_gradients_of_the_input(onednn, graph):
    layer = linear()
    x = torch.randn(2, 65, 24, requires_grad=True)
    cotangent = torch.randn(2, 65, 40)
    (expected,) = torch.autograd.grad(layer(x), x, cotangent)
    use_kernels(layer)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if graph else layer
    (found,) = torch.autograd.grad(run(x), x, cotangent)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    few = torch.randn(3, 24)
    torch.testing.assert_close(run(few), nn.functional.linear(few, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)
    assert ("moacompress::float32_linear" in called(layer, x)) == onednn


def test_a_weight_that_is_trained_has_its_gradient(onednn):
    layer = nn.Linear(8, 4)
    use_kernels(layer)
    for rows in (1, 130):
        layer.zero_grad()
        layer(torch.randn(rows, 8)).sum().backward()
        assert layer.weight.grad is not None
        assert layer.bias.grad is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.weight.data.mul_(2.0),
        lambda layer: setattr(layer.weight, "data", torch.randn(40, 24)),
        lambda layer: layer.to(torch.bfloat16),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(40, 24), requires_grad=False)),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
    ],
)
def test_a_changed_weight_is_the_one_that_is_multiplied(change, onednn):
    layer = linear()
    use_kernels(layer)
    layer(torch.randn(130, 24))
    change(layer)
    x = torch.randn(130, 24).to(layer.bias.dtype)
    assert_plain(layer, x)
    assert_plain(layer, x[:3], 1e-2, 2e-2)


def test_copies_and_pickles_have_weights_of_their_own():
    layer = linear()
    use_kernels(layer)
    x = torch.randn(3, 24)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            other.weight.zero_()
        assert torch.equal(other(x), layer.bias.expand(3, -1))
    assert not torch.equal(layer(x), layer.bias.expand(3, -1))
    assert set(layer.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("rows", [1, 130])
def test_autocast_decides(rows, onednn):
    layer = linear()
    use_kernels(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(rows, 24)).dtype == linear()(torch.randn(rows, 24)).dtype == torch.bfloat16


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_function_transforms_are_torchs_own(transform, dtype, onednn, monkeypatch):
    """Neither the compiled kernels nor an operator with a gradient of its own may be transformed."""
    monkeypatch.setattr(module, "is_widened", lambda x: x.dtype != torch.float32)
    layer, x = linear(dtype=dtype), torch.randn(33, 24).to(dtype)

    def loss(x):
        return (layer(x) ** 2).sum()

    def all_of():
        return (
            torch.func.grad(loss)(x),
            transform(lambda row: loss(row[None]))(x[0]),
            torch.func.jvp(layer, (x,), (x,))[1],
        )

    expected = all_of()
    use_kernels(layer)
    found = all_of()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("rows", [1, 130])
def test_what_is_sparse_or_nested_is_torchs_own(rows, onednn):
    layer, x = linear(bias=False), torch.randn(rows, 24)
    nested = torch.nested.nested_tensor([x, torch.randn(2, 24)], layout=torch.jagged)
    expected = [row @ layer.weight.t() for row in nested.unbind()]
    sparse = linear(bias=False)
    sparse.weight = nn.Parameter(layer.weight.to_sparse_csr(), requires_grad=False)
    use_kernels(layer, sparse)
    for found, wanted in zip(layer(nested).unbind(), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sparse(x), expected[0], atol=1e-5, rtol=1e-5)
    for form in (x.to_sparse(), x.to_sparse_csr()):
        torch.testing.assert_close(layer(form), expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("few", [1, 0.5, 0, -1])
def test_a_few_rows_without_gradients_are_for_the_kernels(dtype, few, use_backend):
    """One row, half of those that are few, all of these, and one more."""
    most = few_rows(torch.zeros(1, dtype=dtype))
    rows = 1 if few == 1 else most - int(few * most) if few >= 0 else most + 1
    layer = linear(dtype=dtype)
    use_kernels(layer)
    x = torch.randn(rows, 1, 24, dtype=dtype)
    kernel = "moacompress_cpu::linear"
    assert (kernel in called(layer, x)) == (rows <= most)
    assert kernel not in called(layer, x.clone().requires_grad_())
    use_backend("reference")
    assert kernel not in called(layer, x)


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("bias", [True, False])
def test_a_projection_of_which_some_rows_are_made_multiplies_likewise(bias):
    made, layer = np.array([0, 3, 4, 39]), linear(bias=bias)
    part = PartProjection(layer, made)
    assert "moacompress_cpu::linear" in called(part, torch.randn(1, 24))
    for rows in (1, 130):
        x = torch.randn(rows, 24)
        expected = torch.zeros(rows, 40)
        expected[:, made] = layer(x)[:, made]
        torch.testing.assert_close(part(x), expected, atol=1e-5, rtol=1e-5)


def test_other_layers_are_left_alone():
    class Other(nn.Linear):
        pass

    layer = Other(4, 4)
    assert use_kernels(layer) == 0
    assert type(layer) is Other
    assert use_kernels(nn.Linear(4, 4, device="meta")) == 0


def test_adapters_are_merged_and_taken_back(tiny_model, onednn):
    from peft import LoraConfig, get_peft_model

    model, ids = tiny_model("llama"), torch.randint(3, 160, (2, 60))
    use_kernels(model)
    with torch.no_grad():
        before = model(ids).logits
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
        expected = adapted(ids).logits
        adapted.merge_adapter()
        torch.testing.assert_close(adapted(ids).logits, expected, atol=1e-3, rtol=1e-3)
        adapted.unmerge_adapter()
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(ids).logits, before, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, expected, atol=1e-3, rtol=1e-3)
    assert (expected - before).abs().max() > 1


def test_layers_of_a_model_under_a_plan_multiply_by_what_is_quickest(tiny_model, random_plan):
    """Until the plan is taken off, and from then on only where that was asked for by itself, before or meanwhile."""
    model = tiny_model("llama").eval()
    plan = random_plan(model_shape(model), 3)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    head, x = model.lm_head, torch.randn(2, 1, model.config.hidden_size)

    def kinds():
        return {type(layer) for layer in linears}

    with torch.no_grad():
        expected = head(x)
        attach(model, plan)
        assert kinds() == {KernelLinear}
        assert (head(x) - expected).abs().max() < 1e-5
    assert kinds() == {KernelLinear}
    detach(model)
    assert kinds() == {nn.Linear}
    attach(model, plan)
    assert use_kernels(model) == 0
    detach(model)
    assert kinds() == {KernelLinear}
    detach(attach(model, plan))
    assert kinds() == {KernelLinear}
    with torch.no_grad():
        assert (head(x) - expected).abs().max() < 1e-5
