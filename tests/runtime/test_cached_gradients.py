"""Gradients of a training forward that leaves `use_cache` as it is: those of one without a cache."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moacompress.core.errors import UnsupportedError
from moacompress.models.modules import attention_modules
from moacompress.models.source import model_shape
from moacompress.rules.formats import FORMATS
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.share import Share, with_shared_rules
from moacompress.runtime import PlanCache, attach

N = 60
KINDS = ("windows", "formats", "gates", "gates and formats", "copies and formats")


def plan_of(kind: str, model: Any, draw: Callable[..., Plan]) -> Plan:
    shape, formats = model_shape(model), kind.endswith("formats")
    if kind.startswith("gates"):
        random_, numbers = random.Random(1), np.random.default_rng(1)
        sizes = (shape.layers, shape.kv_heads, model.config.hidden_size), (shape.layers, shape.kv_heads)
        gates = GateWeights(*(numbers.standard_normal(size).astype(np.float32) for size in sizes))
        names = [*FORMATS] if formats else ["native"]
        made = [
            [
                Rule(4, random_.choice((0, 20)), 0, random_.choice(names), random_.choice(names), *select)
                for select in random_.sample([(9, 0), (0, 200)], shape.kv_heads)
            ]
            for _ in range(shape.layers)
        ]
        return Plan(shape, 16, tuple(map(tuple, made)), gates=gates.fingerprint, gate_weights=gates)
    plan = draw(shape, 3, formats=formats)
    if not kind.startswith("copies"):
        return plan
    shares = (None, Share(0, (1, 0)), None)
    return Plan(shape, plan.min_window, with_shared_rules(plan.rules, shares), shares=shares)


@pytest.fixture(params=KINDS)
def trained(request: Any, tiny_model: Any, random_plan: Any) -> Any:
    """A model in training, gates aside, under every kind of plan."""
    model = tiny_model("llama")
    attach(model, plan_of(request.param, model, random_plan))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("gate" not in name.split("."))
    return model.train()


def gradients(model: Any, ids: torch.Tensor, labels: torch.Tensor | None = None, **given: Any) -> dict[str, Any]:
    model.zero_grad()
    model(ids, labels=ids if labels is None else labels, **given).loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    assert found.keys() == expected.keys()
    return all(
        float((found[name] - each).norm()) <= 1e-4 * float(each.norm()) + 1e-7 for name, each in expected.items()
    )


@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
def test_gradients_are_those_without_a_cache(trained: Any, token_ids: Any, padding: str) -> None:
    ids, given = token_ids(2, N), {}
    if padding != "none":
        mask = torch.ones_like(ids)
        mask[1, {"left": slice(0, 9), "right": slice(N - 9, N), "holes": slice(20, 29)}[padding]] = 0
        given["attention_mask"] = mask
    expected = gradients(trained, ids, use_cache=False, **given)
    assert len(expected) > 20
    assert same(gradients(trained, ids, **given), expected)


def test_checkpointing_and_a_single_token(trained: Any, token_ids: Any) -> None:
    ids = token_ids(2, N)
    expected = gradients(trained, ids, use_cache=False)
    one = {
        name: grad.clone()
        for name, grad in gradients(trained, ids[:, :1], token_ids(2, 2)[:, 1:], use_cache=False).items()
    }
    found = gradients(trained, ids[:, :1], token_ids(2, 2)[:, 1:])
    assert same(found, one)
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
        found.append({name: each.grad for name, each in trained.named_parameters() if each.grad is not None})
    assert same(*found)


def test_gates_learn_with_an_empty_cache(tiny_model: Any, random_plan: Any, token_ids: Any) -> None:
    model, ids = tiny_model("llama"), token_ids(2, N)
    plan = plan_of("gates and formats", model, random_plan)
    attach(model, plan)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("gate.weight"))
    gates: list[Any] = [module.gate for module in attention_modules(model)]
    for gate in gates:
        gate.trained = True
    expected = gradients(model, ids, use_cache=False)
    assert len(expected) == 3
    assert all(grad.any() for grad in expected.values())
    assert same(gradients(model, ids), expected)
    with torch.no_grad():
        cache = model(ids[:, :40]).cache
    with pytest.raises(UnsupportedError, match="an empty cache"):
        model(ids[:, 40:], cache=cache)


def test_compiled(tiny_model: Any, random_plan: Any, token_ids: Any) -> None:
    """The attention runs between graphs."""
    model, ids = tiny_model("llama", num_hidden_layers=1), token_ids(2, N)
    attach(model, random_plan(model_shape(model), 3, formats=True))
    model.train().requires_grad_(True)
    expected = gradients(model, ids, use_cache=False)
    torch._dynamo.reset()
    model.compile(backend="eager")
    assert same(gradients(model, ids, cache=PlanCache(model.config.quantization_config.plan)), expected)
