from __future__ import annotations

import pytest

from moacompress.errors import InfeasibleBudgetError
from moacompress.plan import ModelShape, Plan, Rule
from moacompress.search.baselines import uniform_plan, uniform_plans

DENSE = ModelShape("llama", 3, 4, 2, 16, "float32", (None,) * 3, "w")
SLIDING = ModelShape("gemma3_text", 3, 4, 2, 16, "bfloat16", (64, None, 64), "w")


@pytest.mark.parametrize("shape", [DENSE, SLIDING])
@pytest.mark.parametrize("n", [200, 1000, 1024])
@pytest.mark.parametrize("sink", [4, 16, 64])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_uniform_is_the_widest_that_fits(shape: ModelShape, n: int, sink: int, share: float) -> None:
    limit = int(share * shape.dense_kv_bytes(n))
    try:
        plan = uniform_plan(shape, n, limit, sink, 32)
    except InfeasibleBudgetError:
        assert Plan.uniform(shape, Rule(sink, 32, 0), 32).kv_bytes(n) > limit
        return
    rule = plan.rules[0][0]
    assert {r for row in plan.rules for r in row} == {rule}
    assert (rule.sink, rule.beta_q) == (sink, 0)
    assert plan.kv_bytes(n) <= limit
    wider = [Plan.uniform(shape, Rule(sink, alpha, 0), 32) for alpha in range(rule.alpha + 1, n + 1)]
    assert all(other.kv_bytes(n) > limit for other in wider)


def test_all_of_a_budget_is_the_whole_length() -> None:
    assert uniform_plan(DENSE, 512, DENSE.dense_kv_bytes(512), 4, 32).rules[0][0] == Rule(4, 512, 0)


def test_too_small_a_budget_says_the_smallest() -> None:
    with pytest.raises(InfeasibleBudgetError, match="the smallest, 32 tokens, takes 36,864"):
        uniform_plan(DENSE, 1024, 10, 4, 32)


def test_uniform_plans_hold_at_every_length() -> None:
    limits = {n: DENSE.dense_kv_bytes(n) // 4 for n in (512, 1024)}
    plans = uniform_plans(DENSE, limits, 32)
    assert len({plan.key() for plan in plans}) == len(plans) >= 5
    assert all(plan.kv_bytes(n) <= limit for plan in plans for n, limit in limits.items())
    elastic = [plan.rules[0][0] for plan in plans if plan.rules[0][0].beta_q]
    fixed = [plan.rules[0][0] for plan in plans if not plan.rules[0][0].beta_q]
    assert {rule.sink for rule in elastic} == {rule.sink for rule in fixed} == {4, 16, 64}
    by_sink = {rule.sink: rule for rule in elastic}
    assert all(by_sink[rule.sink].kept(1024, 32) > rule.kept(1024, 32) for rule in fixed)


def test_uniform_plans_of_one_length_are_fixed() -> None:
    plans = uniform_plans(DENSE, {1024: DENSE.dense_kv_bytes(1024) // 4}, 32, sinks=(4, 64))
    assert [(p.rules[0][0].sink, p.rules[0][0].beta_q) for p in plans] == [(4, 0), (64, 0)]
    assert uniform_plans(DENSE, {1024: 10}, 32) == []
