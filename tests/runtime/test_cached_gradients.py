"""Gradients of a training forward that leaves `use_cache` as it is: those of one without a cache."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from moacompress.core.errors import UnsupportedError
from moacompress.models.modules import attention_modules
from moacompress.models.source import model_shape
from moacompress.rules.formats import FORMATS
from moacompress.rules.plan import Plan
from moacompress.rules.share import Share
from moacompress.runtime import PlanCache, attach
from tests import plan_kinds

N = 60


def gates_and_formats(model: Any) -> Plan:
    plan = plan_kinds.gates(model)
    formats = itertools.cycle(itertools.product(FORMATS, FORMATS))
    rules = [[rule.in_formats(*next(formats)) for rule in row] for row in plan.rules]
    return replace(plan, rules=tuple(map(tuple, rules)))


def copies_and_formats(model: Any) -> Plan:
    return plan_kinds.with_shares(plan_kinds.formats(model), (None, Share(0, (1, 0)), None))


KINDS = (plan_kinds.windows, gates_and_formats, copies_and_formats)


@pytest.fixture(params=KINDS)
def trained(request: Any, model: Any) -> Any:
    """A model in training, gates aside, under every kind of plan."""
    made = model(plan=request.param)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_("gate" not in name.split("."))
    return made.train()


def gradients(model: Any, ids: torch.Tensor, labels: torch.Tensor | None = None, **given: Any) -> dict[str, Any]:
    model.zero_grad()
    model(ids, labels=ids if labels is None else labels, **given).loss.backward()
    return gradients_in(model)


def gradients_in(model: Any) -> dict[str, Any]:
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    assert found.keys() == expected.keys()
    return all(
        float((found[name] - each).norm()) <= 1e-4 * float(each.norm()) + 1e-7 for name, each in expected.items()
    )


def test_gradients_are_those_without_a_cache(trained: Any, token_ids: Any) -> None:
    """Padding on the left, on the right and as a hole; none; layers that are computed twice; a single token."""
    ids = token_ids(3, N)
    mask = torch.ones_like(ids)
    mask[0, :9] = mask[1, -9:] = mask[2, 20:29] = 0
    expected = gradients(trained, ids, use_cache=False, attention_mask=mask)
    assert len(expected) > 20
    assert same(gradients(trained, ids, attention_mask=mask), expected)
    ids = ids[:2]
    expected = gradients(trained, ids, use_cache=False)
    one = ids[:, :1], token_ids(2, 2)[:, 1:]
    assert same(gradients(trained, *one), gradients(trained, *one, use_cache=False))
    trained.gradient_checkpointing_enable()
    assert same(gradients(trained, ids), expected)


def test_a_step_after_a_prefix_is_a_chunk_after_it(trained: Any, token_ids: Any) -> None:
    """What is cached is constant; the token's own key and value are not."""
    ids = token_ids(2, N)
    with torch.no_grad():
        prefix = trained(ids[:, :-1]).cache
    mask = torch.ones(2, N + 1, dtype=torch.int64)
    mask[:, -1] = 0
    found = []
    for fed, given in ((ids[:, -1:], {}), (ids[:, [-1, -1]], {"attention_mask": mask})):
        trained.zero_grad()
        trained(fed, cache=prefix.fork(), **given).logits[:, 0].square().mean().backward()
        found.append(gradients_in(trained))
    assert same(*found)


def test_gates_learn_with_an_empty_cache(model: Any, token_ids: Any) -> None:
    made, ids = model(plan=gates_and_formats), token_ids(2, N)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name.endswith("gate.weight"))
    gates: list[Any] = [module.gate for module in attention_modules(made)]
    for gate in gates:
        gate.trained = True
    expected = gradients(made, ids, use_cache=False)
    assert len(expected) == 3
    assert all(grad.any() for grad in expected.values())
    assert same(gradients(made, ids), expected)
    with torch.no_grad():
        cache = made(ids[:, :40]).cache
    with pytest.raises(UnsupportedError, match="an empty cache"):
        made(ids[:, 40:], cache=cache)


@pytest.mark.heavy
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled(tiny_model: Any, random_plan: Any, token_ids: Any) -> None:
    """The attention runs between graphs."""
    model, ids = tiny_model("llama", num_hidden_layers=1), token_ids(2, N)
    attach(model, random_plan(model_shape(model), 3, formats=True))
    model.train().requires_grad_(True)
    expected = gradients(model, ids, use_cache=False)
    model.compile(backend="eager")
    assert same(gradients(model, ids, cache=PlanCache(model.config.quantization_config.plan)), expected)
