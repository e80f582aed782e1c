"""A decode step's layer in one call: the same numbers where it may be, and the layer as it was elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moacompress.kernels.dispatch import few_rows
from moacompress.models.modules import attention_modules
from moacompress.models.source import model_shape
from moacompress.rules.plan import Plan
from moacompress.runtime import attach, detach
from moacompress.runtime.compat.private_names import NORMS
from moacompress.runtime.decode import fused
from moacompress.runtime.decode.all_layers import Stack
from tests.runtime.forwards import after_prompt, difference

pytestmark = pytest.mark.usefixtures("compiled_kernels")


@pytest.fixture(autouse=True)
def _one_by_one(monkeypatch):
    """No call for all layers at once: tests/runtime/test_all_layers.py is about that."""
    monkeypatch.setattr(Stack, "begin", lambda *arguments: None)


@pytest.fixture
def calls(monkeypatch):
    """Counts the steps asked for of whole layers; `[layers]`, which tests may set back."""
    found, own = [0], fused.dispatch

    def dispatch(request):
        found[0] += 1
        return own(request)

    monkeypatch.setattr(fused, "dispatch", dispatch)
    return found


@pytest.mark.parametrize(
    ("family", "dtype", "rows"),
    [
        ("llama", torch.float32, -1),
        ("llama", torch.float16, 1),
        ("mistral", torch.bfloat16, 0),
        ("mistral", torch.float32, 3),
        ("qwen2", torch.float16, 0),
        ("qwen2", torch.bfloat16, 3),
    ],
)
def test_steps_are_those_of_the_layer_s_own_parts(family, dtype, rows, model, calls, steps, monkeypatch):
    """With 0 rows for as many as are few, and -1 for one more."""
    made, most = model(family, dtype), few_rows(torch.zeros(1, dtype=dtype))
    rows = rows if rows > 0 else most - rows
    found, layers = steps(made, rows, 20), len(attention_modules(made))
    assert calls == [(rows <= most) * layers * 20]
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype]
    monkeypatch.setattr(fused, "_layer", lambda *arguments: None)
    calls[0] = 0
    expected = steps(made, rows, 20)
    assert calls == [0]
    assert difference(found, expected) < tolerance


def train_biases(layer):
    for part in (layer.q_proj, layer.k_proj, layer.v_proj):
        part.bias = nn.Parameter(torch.zeros(part.out_features))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.train(),
        lambda layer: layer.self_attn.k_proj.requires_grad_(),
        lambda layer: turn(layer.self_attn.q_proj.weight),
        lambda layer: train_biases(layer.self_attn),
        lambda layer: give_bias(layer.self_attn.q_proj),
        lambda layer: layer.mlp.up_proj.requires_grad_(),
        lambda layer: layer.input_layernorm.requires_grad_(),
        lambda layer: layer.self_attn.register_forward_pre_hook(lambda *arguments: None),
        lambda layer: turn(layer.mlp.up_proj.weight),
        lambda layer: give_bias(layer.mlp.up_proj),
    ],
)
def test_a_layer_that_something_else_has_a_hand_in_is_left_to_itself(change, model, calls, steps):
    made = model()
    expected, layers = steps(made, 2, 20), len(attention_modules(made))
    assert calls == [20 * layers]
    first = made.model.layers[0]
    change(first)
    trained = any(part.requires_grad for part in first.parameters())
    with torch.set_grad_enabled(trained):
        ids, cache = after_prompt(made)
        calls[0] = 0
        made(ids[:, 50:], cache=cache)
    # where it is trained, what comes after the first layer may have gradients too
    assert calls in ([[0], [layers - 1]] if trained else [[layers - 1]])
    made.eval()
    found = steps(made, 2, 20)
    assert difference(found, expected) < 2e-5


def turn(weight):
    weight.data = weight.data.t().contiguous().t()


def give_bias(linear):
    linear.bias = nn.Parameter(torch.zeros(linear.out_features), False)


def test_a_changed_epsilon_keeps_a_layer_to_itself(model, calls, steps):
    made = model()
    made.model.layers[0].input_layernorm.variance_epsilon = 0.5
    found = steps(made, 2, 20)
    layers = len(attention_modules(made))
    assert calls == [20 * (layers - 1)]
    for name in NORMS:
        getattr(made.model.layers[0], name).variance_epsilon = 0.5
    calls[0] = 0
    assert not torch.equal(steps(made, 2, 20), found)
    assert calls == [20 * layers]


def test_other_families_and_dense_models_keep_their_classes(tiny_model, random_plan):
    made = tiny_model("llama")
    layers = [*made.model.layers]
    own = [type(layer) for layer in layers]
    attach(made, random_plan(model_shape(made), 3))
    for layer, kind in zip(layers, own, strict=True):
        assert type(layer) is not kind
        assert isinstance(layer, kind)
        assert type(layer).__name__ == kind.__name__  # what FSDP and device maps go by
        assert type(layer).__qualname__ == f"Fused{kind.__name__}"
    attach(made, Plan.full(made._moacompress.plan.model))
    detach(made)
    assert [type(layer) for layer in layers] == own
    other = tiny_model("gemma2")
    layers = [*attention_modules(other), *other.model.layers]
    own = [type(layer) for layer in layers]
    attach(other, random_plan(model_shape(other), 3))
    assert [type(layer) for layer in layers] == own


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_graph_that_is_made_after_hidden_states_has_fused_layers(model, steps):
    made, graphs = model(), []
    ids, cache = after_prompt(made, 2)

    def backend(graph, examples):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    with torch.no_grad():
        expected = made(ids, use_cache=False, output_hidden_states=True).hidden_states
        compiled = torch.compile(made, backend=backend, fullgraph=True)
        compiled(ids[:, 50:51], cache=cache)
        found = compiled(ids[:, 51:], cache=cache, output_hidden_states=True).hidden_states
    fused_layers = [graph.count("moacompress.step_layer") for graph in graphs]
    assert fused_layers[0] == len(made.model.layers)
    assert fused_layers[-1] == 0
    for mine, other in zip(found, expected, strict=True):
        assert (mine[:, 0] - other[:, 51]).abs().max() < 2e-5 * other.abs().max()
