"""Limits: tables of bytes, plans and budgets agree on them, and a budget that no plan meets is refused with its numbers."""

from __future__ import annotations

import numpy as np
import pytest

from moacompress.core.errors import BudgetError, InfeasibleBudgetError
from moacompress.rules.budget import Budget
from moacompress.rules.candidates import candidate_rules, gated_rules, in_formats
from moacompress.rules.formats import CODED
from moacompress.rules.kv_bytes import candidate_kv_bytes
from moacompress.rules.limits import budget_limits, floored, is_within, layer_floors, limit_array, smallest_kv_bytes
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import SINKS, Rule

SHAPE = ModelShape("llama", 3, 4, 2, 16, "float32", (None, 64, None), "0123456789abcdef")
SPANS = candidate_rules(512, SINKS, 32)
RULES = in_formats((*candidate_rules(512, SINKS, 16), *gated_rules(512, SINKS, 16)), CODED)
ARGUMENTS = (SHAPE, (256, 512), RULES, 16)


def parsed(*texts: str) -> list[Budget]:
    return [Budget.parse(text) for text in texts]


@pytest.mark.parametrize("seed", range(2))
def test_a_table_and_a_plan_say_the_same(seed: int) -> None:
    """To the byte: the solver, the plan's notes and what is checked agree."""
    random = np.random.default_rng(seed)
    choice = random.integers(len(RULES), size=(SHAPE.layers, SHAPE.kv_heads))
    rows = [[RULES[number] for number in row] for row in choice.tolist()]
    rows[1] = [rule.without_choice() for rule in rows[1]]  # as plans have them in a layer with a window of its own
    plan = Plan(SHAPE, 16, tuple(map(tuple, rows)), gates="0" * 16)
    index = {rule: number for number, rule in enumerate(RULES)}
    choice = np.array([[index[rule] for rule in row] for row in rows])
    table = candidate_kv_bytes(SHAPE, RULES, 16, [300, 512])
    assert table.dtype == np.int64
    assert table.shape == (2, 3, 2, len(RULES))
    for n, sizes in zip((300, 512), table, strict=True):
        assert np.take_along_axis(sizes, choice[..., None], axis=-1).sum() == plan.kv_bytes(n)
    limits = {n: plan.kv_bytes(n) for n in (300, 512)}
    assert limit_array(limits).tolist() == list(limits.values())
    assert is_within(plan, limits)
    assert not is_within(plan, limits | {512: limits[512] - 1})


def test_shares_of_bytes_and_the_smallest_budget() -> None:
    assert budget_limits(parsed("50%"), *ARGUMENTS) == {n: SHAPE.dense_kv_bytes(n) // 2 for n in (256, 512)}
    assert list(budget_limits(parsed("50%@1k"), *ARGUMENTS)) == [1024]
    with pytest.raises(InfeasibleBudgetError, match="at least") as error:
        budget_limits(parsed("1%"), *ARGUMENTS)
    need = str(error.value).split("at least ")[1].split("%")[0]
    budget_limits(parsed(f"{need}%@256"), *ARGUMENTS)
    with pytest.raises(BudgetError, match="no budget"):
        budget_limits([], *ARGUMENTS)


def test_the_smallest_plan_is_one_rule() -> None:
    smallest = smallest_kv_bytes(SHAPE, SPANS, 32, (256, 512))
    plan = Plan.uniform(SHAPE, Rule(min(SINKS), 32, 0), 32)
    assert smallest == {n: plan.kv_bytes(n) for n in (256, 512)}


def test_floors_stand_for_the_full_rule() -> None:
    arguments = (SHAPE, SPANS, 32, (256, 512))
    table, floors = candidate_kv_bytes(*arguments), layer_floors({2: 0.5}, SHAPE)
    found = floored(table, floors)
    assert np.array_equal(found[:, :2], table[:, :2])
    assert (found[:, 2] >= table[:, 2, :, :1] / 2).all()
    assert (found[:, 2] < table[:, 2, :, :1]).any()
    assert all(smallest_kv_bytes(*arguments, floors)[n] > smallest_kv_bytes(*arguments)[n] for n in (256, 512))
    assert budget_limits(parsed("10%@512"), *ARGUMENTS)
    with pytest.raises(InfeasibleBudgetError, match="no plan fits .* KV bytes at 512 tokens"):
        budget_limits(parsed("10%@512"), *ARGUMENTS, floors=floors)


def test_a_budget_of_memory_is_what_weights_leave() -> None:
    weights = 10_000
    assert budget_limits(parsed("memory=64KiB@512"), *ARGUMENTS, weights=weights) == {512: 65_536 - 10_000}
    with pytest.raises(BudgetError, match="is of weights and cache together"):
        budget_limits(parsed("memory=64KiB@512"), *ARGUMENTS)
    with pytest.raises(InfeasibleBudgetError, match="weights take 10,000 as they are and the KV cache at least"):
        budget_limits(parsed("memory=10KiB@512"), *ARGUMENTS, weights=weights)
