"""A decode step's attention layer in one call: the same numbers, where it may be, and the layer as it was elsewhere."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from moacompress.kernels import dispatch
from moacompress.models import attention_modules, model_shape
from moacompress.plan import Plan
from moacompress.runtime import PlanCache, attach, detach, fused
from moacompress.runtime.packing import FEW_ROWS, pack_weights

FAMILIES = ("llama", "mistral", "qwen2")


@pytest.fixture(autouse=True)
def _kernels():
    if dispatch.chosen().name != "cpu":
        pytest.skip(dispatch.chosen().reason)


@pytest.fixture
def fitted(monkeypatch):
    """Whether each call since the last `clear` was made in one."""
    found = []
    before = fused._fits

    def fits(*arguments):
        found.append(before(*arguments))
        return found[-1]

    monkeypatch.setattr(fused, "_fits", fits)
    return found


@pytest.fixture
def model(tiny_model, random_plan):
    def make(family="llama", dtype=torch.float32, **config):
        made = tiny_model(family, **config).to(dtype).eval().requires_grad_(False)
        return attach(made, random_plan(model_shape(made), 3))

    return make


def steps(model, rows, count=20, dtype=None):
    """Returns the logits of steps after a prompt, `[rows, count, vocabulary]`."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(3, model.config.vocab_size, (rows, 50 + count), generator=generator)
    with torch.no_grad():
        cache = model(ids[:, :50]).cache
        return torch.cat([model(ids[:, 50 + i : 51 + i], cache=cache).logits for i in range(count)], 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS, FEW_ROWS + 1])
def test_steps_are_those_of_the_layer_s_own_parts(family, dtype, rows, model, fitted, monkeypatch):
    made = model(family, dtype)
    found = steps(made, rows)
    layers = len(attention_modules(made))
    assert fitted == [False] * layers + [rows <= FEW_ROWS] * layers * 20
    monkeypatch.setattr(fused, "_fits", lambda *arguments: False)
    expected = steps(made, rows)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype]
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


def test_the_first_token_needs_no_prompt(model, fitted):
    made = model()
    ids = torch.randint(3, made.config.vocab_size, (2, 30))
    cache = PlanCache(made._moacompress.plan)
    with torch.no_grad():
        found = torch.cat([made(ids[:, i : i + 1], cache=cache).logits for i in range(30)], 1)
        expected = made(ids, use_cache=False).logits
    assert sum(fitted) == 30 * len(attention_modules(made))
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


def test_rotation_is_that_of_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query, key, cos, sin = (
        torch.randn(2, 3, 5, 16),
        torch.randn(2, 1, 5, 16),
        torch.randn(2, 5, 16),
        torch.randn(2, 5, 16),
    )
    wanted = apply_rotary_pos_emb(query, key, cos, sin)
    assert torch.equal(fused.rotated(query, cos, sin), wanted[0])
    assert torch.equal(fused.rotated(key, cos, sin), wanted[1])


def train_biases(layer):
    for part in (layer.q_proj, layer.k_proj, layer.v_proj):
        part.bias = nn.Parameter(torch.zeros(part.out_features))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.train(),
        lambda layer: layer.k_proj.requires_grad_(),
        lambda layer: layer.q_proj.register_forward_hook(lambda *arguments: None),
        lambda layer: layer.v_proj.register_forward_pre_hook(lambda *arguments: None),
        lambda layer: setattr(layer, "q_proj", nn.Sequential(layer.q_proj)),
        lambda layer: setattr(layer.q_proj.weight, "data", layer.q_proj.weight.t().contiguous().t()),
        train_biases,
        lambda layer: setattr(layer.q_proj, "bias", nn.Parameter(torch.zeros(layer.q_proj.out_features), False)),
    ],
)
def test_a_layer_that_something_else_has_a_hand_in_is_left_to_itself(change, model, fitted):
    made = model()
    expected = steps(made, 2)
    assert all(fitted[len(attention_modules(made)) :])
    change(attention_modules(made)[0])
    fitted.clear()
    with torch.set_grad_enabled(any(part.requires_grad for part in attention_modules(made)[0].parameters())):
        ids = torch.randint(3, made.config.vocab_size, (2, 51))
        cache = made(ids[:, :50]).cache
        fitted.clear()
        made(ids[:, 50:], cache=cache)
    assert not fitted[0]
    for layer in attention_modules(made):
        layer.eval()
    found = steps(made, 2)
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


def test_other_families_and_dense_models_keep_their_classes(tiny_model, random_plan):
    made = tiny_model("llama")
    own = type(attention_modules(made)[0])
    attach(made, random_plan(model_shape(made), 3))
    assert type(attention_modules(made)[0]).__name__ == "FusedLlamaAttention"
    assert isinstance(attention_modules(made)[0], own)
    attach(made, Plan.full(made._moacompress.plan.model))
    detach(made)
    assert all(type(layer) is own for layer in attention_modules(made))
    other = tiny_model("gemma2")
    own = type(attention_modules(other)[0])
    attach(other, random_plan(model_shape(other), 3))
    assert all(type(layer) is own for layer in attention_modules(other))


def test_copies_and_pickles_of_layers(model):
    made = model()
    layer = attention_modules(made)[0]
    assert type(copy.deepcopy(layer)) is type(layer)
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is type(layer)
    fused.unfuse(again)
    assert type(again).__name__ == "LlamaAttention"
    with pytest.raises(AttributeError, match="FusedNothing"):
        fused.FusedNothing  # noqa: B018


def test_packed_and_compiled(model, fitted):
    made = model()
    expected = steps(made, 2, 5)
    pack_weights(made)
    assert (steps(made, 2, 5) - expected).abs().max() < 2e-5 * expected.abs().max()
    compiled = torch.compile(made.forward, backend="aot_eager", fullgraph=True)
    ids = torch.randint(3, made.config.vocab_size, (2, 55), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        cache = made(ids[:, :50]).cache
        positions = torch.arange(50, 55).expand(2, 5)
        found = torch.cat(
            [
                compiled(ids[:, 50 + i : 51 + i], position_ids=positions[:, i : i + 1], cache=cache).logits
                for i in range(5)
            ],
            1,
        )
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


def test_a_cache_of_other_rows_is_refused(model):
    made = model()
    ids = torch.randint(3, made.config.vocab_size, (2, 50))
    with torch.no_grad():
        cache = made(ids).cache
        with pytest.raises(Exception, match="rows"):
            made(ids[:1, :1], cache=cache)
