"""Centres of keys: any changes nothing where keys are kept as they are, by every route, and codes are of what is left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from moacompress.core.errors import UnsupportedError
from moacompress.models.source import model_shape
from moacompress.rules.key_centres import as_centres, centre_numbers
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.share import Share
from moacompress.runtime import PlanCache, attach
from moacompress.runtime.decode import attention
from tests.conftest import TINY
from tests.plan_kinds import KINDS, centres, random_centres, random_plan, with_shares
from tests.runtime.forwards import difference, in_parts, logits, plan_of

BOUNDED = "gemma2"
"""A family that bounds its scores, which count as they are."""
FAMILIES = [family for family in TINY if family != BOUNDED]
NORM = 100.0
NATIVE = ("windows", "gates", "shares")


def plan_for(model: Any, kind: str) -> Plan:
    if kind != "shares":
        return KINDS[kind](model)
    plan = random_plan(model_shape(model), seed=5)
    windows = plan.model.native_windows
    heads = tuple(reversed(range(plan.model.kv_heads)))
    return with_shares(plan, (None, None, Share(0 if windows[0] == windows[2] else 1, heads)))


def give_centres(model: Any, norm: float = NORM) -> Any:
    """Has all keys of a model under a plan lie less a centre, those too that are kept as they are: a plan has none of these."""
    attachment = model._moacompress
    shape = attachment.plan.model
    drawn = random_centres(shape, norm)
    for layer, hook in enumerate(attachment.layer_hooks):
        if hook.context.share is None:
            centre = torch.from_numpy(centre_numbers(drawn[layer], shape.head_dim))
            hook.context = replace(hook.context, centre=centre, _centres={})
    return model


@pytest.fixture
def pair(tiny_model: Any) -> Callable[..., tuple[Any, Any]]:
    """Makes two models under one plan; all keys of the second lie less centres."""

    def make(family: str = "llama", kind: str = "windows", **more: Any) -> tuple[Any, Any]:
        plain, moved = (tiny_model(family, **more) for _ in range(2))
        plan = plan_for(plain, kind)
        return attach(plain, plan), give_centres(attach(moved, plan))

    return make


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert difference(found, expected) < 2e-3  # scores of some hundred have an ulp of 3e-5


@pytest.mark.parametrize(
    ("family", "kind"), [(family, NATIVE[number % len(NATIVE)]) for number, family in enumerate(FAMILIES)]
)
def test_nothing_changes_at_native_formats(family: str, kind: str, pair: Any, token_ids: Any) -> None:
    plain, moved = pair(family, kind)
    ids = token_ids(2, 75) % plain.config.get_text_config().vocab_size
    assert_close(logits(moved, ids, use_cache=False), logits(plain, ids, use_cache=False))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    found, expected = (in_parts(model, ids, (40, 20), mask=mask) for model in (moved, plain))
    assert_close(found[0], expected[0])
    assert_close(found[1, 9:], expected[1, 9:])


@pytest.mark.heavy
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_by_torch(pair: Any, token_ids: Any) -> None:
    plain, moved = pair(kind="shares")
    ids = token_ids(2, 64) % 160
    compiled = torch.compile(moved, backend="eager")
    assert_close(in_parts(compiled, ids, (40, 20), PlanCache(plan_of(moved))), in_parts(plain, ids, (40, 20)))


def test_gradients_are_those_of_keys_as_they_are(pair: Any, token_ids: Any) -> None:
    found = []
    ids = token_ids(1, 70) % 160
    for model in pair("gpt_oss"):
        model.requires_grad_(True)
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: weight.grad for name, weight in model.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        assert (grad - found[1][name]).abs().max() <= 2e-3 * grad.abs().max() + 1e-6, name


def test_a_centre_makes_codes_of_keys_with_a_bias_exact(
    tiny_model: Any, token_ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys with one large constant: codes lose what tells them apart, and less that constant much less."""
    dense, ids = tiny_model("llama", attention_bias=True), token_ids(1, 90) % 160
    for layer in dense.model.layers:
        layer.self_attn.k_proj.bias.data.zero_().view(2, -1)[:, 7] = 300.0  # a pair that rotary hardly turns
    shape = model_shape(dense)
    keys: list[torch.Tensor] = []

    def under(plan: Plan) -> torch.Tensor:
        logits: torch.Tensor = attach(copy.deepcopy(dense), plan)(ids, use_cache=False).logits
        return logits

    with torch.no_grad():
        with monkeypatch.context() as patch:
            attended = attention._attended

            def noted(*given: Any) -> Any:
                keys.append(given[2].mean((0, 2)))
                return attended(*given)

            patch.setattr(attention, "_attended", noted)
            expected = under(Plan.full(shape))
        plan = Plan.uniform(shape, Rule.FULL.in_formats("int4", "native"), 16)
        without, less = under(plan), under(replace(plan, centres=as_centres(torch.stack(keys).numpy())))
    assert (less - expected).abs().mean() < 0.2 * (without - expected).abs().mean()


def test_bounded_scores_have_none(model: Any, token_ids: Any) -> None:
    with pytest.raises(UnsupportedError, match="centres of its keys"):
        model(BOUNDED, plan=centres)(token_ids(1, 20) % 160)
