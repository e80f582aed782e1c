"""Layers that share attention, against stock models whose attention is written from the definition."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moacompress.core.errors import UnsupportedError
from moacompress.models.modules import attention_modules
from moacompress.models.source import model_shape
from moacompress.rules.plan import Plan
from moacompress.runtime import attach, detach
from tests import oracle
from tests.conftest import five_layers
from tests.plan_kinds import shares_of, with_shares
from tests.runtime.forwards import difference, in_parts, logits

SIZES = [70, 1, 45, 1, 1, 30, 1, 1, 1]
EXACT, FLIPS = 2e-5, 2e-2
"""Largest differences of logits, as shares of the largest: of summation order, and of codes that it flips by one step."""


@pytest.fixture
def shared(family: str, tiny_model: Callable[..., Any], random_plan: Callable[..., Plan]) -> tuple[Any, Plan]:
    """A model of every family under a plan with layers that share attention, and the plan."""
    model = tiny_model(family, **five_layers(family))
    shape = model_shape(model)
    return model, with_shares(random_plan(shape, 5), shares_of(shape, sum(map(ord, family))))


@pytest.fixture
def llama(tiny_model: Callable[..., Any], random_plan: Callable[..., Plan]) -> Callable[[int], tuple[Any, Plan]]:
    """Returns a function that makes a tiny model of six layers and a plan under which some share attention."""

    def make(seed: int) -> tuple[Any, Plan]:
        model = tiny_model("llama", num_hidden_layers=6)
        shape = model_shape(model)
        return model, with_shares(random_plan(shape, seed), shares_of(shape, seed))

    return make


@pytest.mark.parametrize(("formats", "near"), [(False, EXACT), (True, FLIPS)])
def test_sharing_is_the_stock_model_with_it(
    formats: bool, near: float, family: str, tiny_model: Any, random_plan: Any, token_ids: Any
) -> None:
    model = tiny_model(family, **five_layers(family))
    shape = model_shape(model)
    plan = with_shares(random_plan(shape, 5, formats=formats), shares_of(shape, formats + sum(map(ord, family))))
    ids = token_ids(2, sum(SIZES))
    expected = oracle.logits(model, plan, ids)
    assert difference(oracle.logits(model, replace(plan, shares=()), ids), expected) > 0.01, "sharing must matter"
    attach(model, plan)
    assert difference(logits(model, ids, use_cache=False), expected) < near
    assert difference(in_parts(model, ids, SIZES, plan=plan), expected) < near


def _share_gone(name: str, heads: int, kv_heads: int) -> Fraction:
    """Returns how much of a weight of attention a reuse layer does without."""
    if name.startswith(("qkv_proj", "query_key_value")):
        return Fraction(kv_heads + heads, heads + 2 * kv_heads)
    return Fraction(name.startswith(("k_", "q_")))


def test_a_checkpoint_has_no_dropped_projections(shared: tuple[Any, Plan], token_ids: Any, tmp_path: Path) -> None:
    model, plan = shared
    ids, count = token_ids(1, 60), model.num_parameters()
    dense, gone = logits(model, ids), Fraction(0)
    for module, share in zip(attention_modules(model), plan.shares, strict=True):
        if share is None:
            continue
        for name, weight in module.named_parameters():
            gone += weight.numel() * _share_gone(name, plan.model.heads, plan.model.kv_heads)
    attach(model, plan)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert loaded.num_parameters() == count - gone
    with pytest.raises(UnsupportedError, match="have no queries and keys of their own"):
        detach(loaded)
    detach(model)
    assert torch.equal(logits(model, ids), dense)
    assert model.num_parameters() == count


def test_what_was_trained_and_moved_stays_so_without_a_plan(shared: tuple[Any, Plan], token_ids: Any) -> None:
    """Values of a reuse layer that a fused projection makes, too, and the queries and keys that were out of the model."""
    model, plan = shared
    ids = token_ids(1, 60)
    attach(model, plan)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    trained = {name: parameter.bfloat16() for name, parameter in model.named_parameters()}
    model.bfloat16()
    detach(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    layers = {f"layers.{layer}." for layer, share in enumerate(plan.shares) if share is not None}
    fused = 0
    for name, parameter in model.named_parameters():
        there = trained.get(name)
        if there is not None and there.shape == parameter.shape:
            assert torch.equal(there, parameter)
        elif there is not None and len(there):  # some rows are trained, the others as they were
            assert any(layer in name for layer in layers)
            assert sum(any(torch.equal(row, mine) for mine in parameter) for row in there) == len(there)
            fused += 1
    families = {"qkv_proj": 1, "query_key_value": 1}
    assert bool(fused) == any(name.split(".")[-2] in families for name in trained)
    assert logits(model, ids).isfinite().all()


def test_without_moacompress_it_fails(llama: Callable[[int], tuple[Any, Plan]], tmp_path: Path) -> None:
    model, plan = llama(0)
    attach(model, plan).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_definition(
    llama: Callable[[int], tuple[Any, Plan]], token_ids: Any, checkpointing: bool
) -> None:
    model, plan = llama(3)
    ids = token_ids(2, 90)
    model.requires_grad_(True).train()
    with oracle.attending(model, plan):
        model(ids, use_cache=False).logits.square().sum().backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    attach(model, plan)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(ids, use_cache=False).logits.square().sum().backward()
    anchor = next(share.anchor for share in plan.shares if share is not None)
    assert expected[f"model.layers.{anchor}.self_attn.k_proj.weight"].abs().max() > 0
    for name, weight in model.named_parameters():
        if weight.numel():
            assert difference(weight.grad, expected[name]) < 1e-4, name


def test_reentrant_checkpointing_is_refused(llama: Callable[[int], tuple[Any, Plan]], token_ids: Any) -> None:
    model, plan = llama(3)
    attach(model, plan).requires_grad_(True).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UnsupportedError, match="by reentrant gradient checkpointing, .*'use_reentrant': False"):
        model(token_ids(2, 40), use_cache=False)
    model.eval()
    model(token_ids(2, 40), use_cache=False)


def test_a_layer_alone_is_refused(llama: Callable[[int], tuple[Any, Plan]]) -> None:
    model, plan = llama(0)
    attach(model, plan)
    layer = next(layer for layer, share in enumerate(plan.shares) if share is not None)
    hidden = torch.randn(1, 5, model.config.hidden_size)
    rotary = model.model.rotary_emb(hidden, torch.arange(5)[None])
    with pytest.raises(UnsupportedError, match=f"layer {layer} shares the attention of layer .* run the decoder whole"):
        model.model.layers[layer](hidden, position_embeddings=rotary)
