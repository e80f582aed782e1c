"""What `attach` writes into, and what it leaves alone: configs that other models hold."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig, PreTrainedModel

from moacompress.core.errors import BudgetError, ModelError, PlanError
from moacompress.models.source import model_shape
from moacompress.rules.share import Share
from moacompress.runtime import PlanCache, attach, detach
from moacompress.runtime.hf import attaching
from moacompress.runtime.hf.attaching import attached_plan
from tests import plan_kinds

COMPOSITE = "llava"
"""A model whose decoder has a part of the whole model's config."""


@pytest.fixture(params=["gemma3_text", COMPOSITE])
def pair(request: pytest.FixtureRequest, tiny_model: Any) -> tuple[PreTrainedConfig, PreTrainedModel, PreTrainedModel]:
    """A config and two models that were built from this very object, with different weights."""
    model = tiny_model("llama" if request.param == COMPOSITE else request.param)
    config, kind = copy.deepcopy(model.config), type(model)
    if request.param == COMPOSITE:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, **sizes}
        config, kind = LlavaConfig(text_config=config, vision_config=vision), LlavaForConditionalGeneration
    torch.manual_seed(0)
    first, second = (kind(config).eval().requires_grad_(False) for _ in range(2))
    assert first.config is second.config is config
    return config, first, second


def written(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns what is written in a config and its parts, private names too."""
    found = copy.deepcopy(vars(config))
    return {name: written(value) if isinstance(value, PreTrainedConfig) else value for name, value in found.items()}


def test_a_model_of_the_same_config_stays_dense(pair, random_plan, token_ids, tmp_path):
    config, first, second = pair
    ids, plan = token_ids(1, 90), random_plan(model_shape(first), 3)
    before, settings = written(config), {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        expected, generated = second(ids).logits, second.generate(ids, **settings)
        dense = first(ids).logits
        attach(first, plan)
        assert not torch.equal(first(ids).logits, dense)
        assert torch.equal(second(ids).logits, expected)
        assert torch.equal(second.generate(ids, **settings), generated)
        third = type(first)(config).eval()
        assert not isinstance(third(ids).cache, PlanCache)
        assert second.config is config
        assert written(config) == before
        second.save_pretrained(tmp_path / "dense")
        first.save_pretrained(tmp_path / "compressed")
        for name in ("dense", "compressed"):
            found = json.loads((tmp_path / name / "config.json").read_text())
            assert ("quantization_config" in found) == (name == "compressed")
        attach(second, plan)
        assert torch.equal(detach(first)(ids).logits, dense)
        assert not torch.equal(second(ids).logits, expected)
        assert torch.equal(detach(second)(ids).logits, expected)
    assert first.config.to_dict() == second.config.to_dict() == config.to_dict()


def test_all_modules_of_a_model_still_hold_one_config(pair, random_plan):
    _, first, _ = pair

    def places():
        holders = {**dict(first.named_modules()), "config": first.config}
        return {
            (holder, name): value
            for holder, held_by in holders.items()
            for name, value in vars(held_by).items()
            if isinstance(value, PreTrainedConfig)
        }

    def first_places(held):
        configs = [*map(id, held.values())]
        return {place: configs.index(id(config)) for place, config in held.items()}

    before = places()
    attach(first, random_plan(model_shape(first), 3))
    after = places()
    assert {*map(id, before.values())}.isdisjoint(map(id, after.values()))
    assert first_places(after) == first_places(before)


@pytest.mark.parametrize("place", ["model", "model.layers.1.self_attn", "model.rotary_emb"])
def test_a_config_that_is_shared_in_one_place(place, tiny_model, random_plan, token_ids):
    first, second = tiny_model(), tiny_model(seed=1)
    second.get_submodule(place).config = first.config
    ids = token_ids(1, 90)
    with torch.no_grad():
        expected = second(ids).logits
        attach(first, random_plan(model_shape(first), 3))
        assert torch.equal(second(ids).logits, expected)


@pytest.mark.parametrize(
    ("earlier", "kind", "error", "match"),
    [
        (True, "too few layers", PlanError, "2 layers"),
        (True, "without its gates", PlanError, "gates"),
        (False, "prefixes", BudgetError, "MOACOMPRESS_PREFIXES: size 'lots'"),
        (True, "prefixes", BudgetError, "MOACOMPRESS_PREFIXES: size 'lots'"),
        (True, "later", ModelError, "no"),
    ],
)
def test_a_plan_that_fails_leaves_the_one_before(
    earlier, kind, error, match, tiny_model, random_plan, token_ids, monkeypatch
):
    model, ids = tiny_model(), token_ids(2, 70)
    own, plan = random_plan(model_shape(model), 1), random_plan(model_shape(model), 2)
    if earlier:
        attach(model, own)
    expected, config, heads = model(ids).logits, model.config, attaching.shard_to_local_heads

    def fails(model):
        if attached_plan(model) == plan:
            raise ModelError("no")
        heads(model)

    with monkeypatch.context() as patch:
        if kind == "too few layers":
            plan = random_plan(model_shape(tiny_model(num_hidden_layers=2)), 3)
        elif kind == "without its gates":
            plan = replace(plan_kinds.gates(tiny_model()), gate_weights=None)
        elif kind == "prefixes":
            plan = plan_kinds.with_shares(plan, (None, Share(0, (1, 0)), None))
            patch.setenv("MOACOMPRESS_PREFIXES", "lots")
        else:
            patch.setattr(attaching, "shard_to_local_heads", fails)
        with pytest.raises(error, match=match):
            attach(model, plan)
    assert model.config is config or kind == "later"
    assert attached_plan(model) == (own if earlier else None)
    assert torch.equal(model(ids).logits, expected)


def test_a_plan_from_inference_mode_can_be_trained_under(tiny_model, random_plan, token_ids):
    model, ids = tiny_model(), token_ids(2, 70)
    with torch.inference_mode():
        attach(model, random_plan(model_shape(model), 1))
    model.requires_grad_(True).train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().max() > 0
