"""Plans of other projects: there and back, what is lost is said, and spans never become smaller where they are compared."""

from __future__ import annotations

import numpy as np
import pytest

from moacompress.core.errors import PlanError
from moacompress.rules.foreign_plans import DuoPattern, MoaSpans, duo_of_plan, moa_of_plan, plan_of_duo, plan_of_moa
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule

SHAPE = ModelShape("llama", 3, 8, 4, 64, "bfloat16", (None,) * 3, "2-0123456789abcdef")


def test_a_pattern_there_and_back() -> None:
    heads = [[1.0, 0.0, 0.7, 0.2], [0.0, 0.0, 1.0, 1.0], [0.5, 0.49, 0.1, 0.9]]
    plan, notes = plan_of_duo(DuoPattern(heads, 64, 256), SHAPE)
    assert notes == []
    assert [[rule.is_full for rule in row] for row in plan.rules] == [
        [weight >= 0.5 for weight in row] for row in heads
    ]
    assert {rule for row in plan.rules for rule in row if not rule.is_full} == {Rule(64, 256, 0)}
    back, lost = duo_of_plan(plan)
    assert lost == []
    assert (back.sink, back.recent) == (64, 256)
    assert [[weight >= 0.5 for weight in row] for row in back.heads] == [
        [weight >= 0.5 for weight in row] for row in heads
    ]


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 1.0])
def test_a_sparsity_takes_the_least_weights(sparsity: float) -> None:
    heads = np.random.default_rng(3).random((3, 4))
    plan, _ = plan_of_duo(DuoPattern(heads.tolist(), 64, 256), SHAPE, sparsity)
    full = np.array([[rule.is_full for rule in row] for row in plan.rules])
    assert (~full).sum() == sparsity * 12
    if 0 < sparsity < 1:
        assert heads[~full].max() < heads[full].min()


def test_a_sink_that_there_is_not_is_said() -> None:
    plan, notes = plan_of_duo(DuoPattern([[0.0] * 4] * 3, 128, 20), SHAPE)
    assert plan.rules[0][0].sink == 64
    assert plan.min_window == 16
    assert notes == ["its sink of 128 tokens is one of 64 here"]
    plan, notes = plan_of_duo(DuoPattern([[0.0] * 4] * 3, 4, 8), SHAPE)
    assert notes == ["its window of 8 tokens is one of 16 here, the smallest that there is"]


def test_what_a_pattern_cannot_say_is_full_or_listed() -> None:
    rules = tuple(
        (Rule(4, 128, 0), Rule(4, 128, 0, "int8", "int4"), Rule(4, 256, 64), Rule.FULL) for _ in range(SHAPE.layers)
    )
    pattern, lost = duo_of_plan(Plan(SHAPE, 32, rules))
    assert pattern.heads == [[0.0, 0.0, 1.0, 1.0]] * 3
    assert (pattern.sink, pattern.recent) == (4, 128)
    assert lost == [
        "3 KV heads with other windows are full in it",
        "the formats of 3 KV heads are left out: all is native in it",
    ]


def test_spans_there_and_back() -> None:
    rules = tuple((Rule(64, 512, 128), Rule.FULL, Rule(64, 1024, 0), Rule(64, 0, 256)) for _ in range(SHAPE.layers))
    plan = Plan(SHAPE, 64, rules)
    spans, lost = moa_of_plan(plan)
    assert spans.alphas[0] == [512.0, 512.0, 0.0, 0.0, 1024.0, 1024.0, 0.0, 0.0]
    assert spans.betas[0] == [0.125, 0.125, 1.0, 1.0, 0.0, 0.0, 0.25, 0.25]
    assert lost == ["windows of 3 KV heads may be smaller there than the plan's smallest, 64 tokens"]
    back, notes = plan_of_moa(spans, SHAPE, 8192)
    assert back.rules == rules
    assert notes == []


def test_a_kv_head_gets_the_largest_span_of_its_query_heads() -> None:
    rng = np.random.default_rng(5)
    alphas, betas = rng.choice([-1024.0, 0.0, 1024.0], (3, 8)), rng.choice([0.0, 0.125, 0.5, 0.875], (3, 8))
    for length in (2048, 8192):
        plan, notes = plan_of_moa(MoaSpans(alphas.tolist(), betas.tolist()), SHAPE, length)
        asked = np.clip(alphas + betas * length, 64, length).reshape(3, 4, 2).max(2)
        got = [[min(length, max(64, rule.alpha + (rule.beta_q * length >> 10))) for rule in row] for row in plan.rules]
        assert (np.array(got) >= asked).all()
        assert (np.array(got) <= asked + length / 1024 + 1).all()
        assert any("the largest at" in note for note in notes)
    narrow = MoaSpans([[10.0] * 4 + [64.0] * 4] * 3, [[0.0] * 8] * 3)
    plan, notes = plan_of_moa(narrow, SHAPE, 8192)
    assert notes == ["windows of 6 KV heads are smaller at 8,192 tokens than 64 tokens, and have so many here"]


def test_gates_and_sinks_are_listed() -> None:
    rule = Rule(4, 64, 0, select_alpha=16)
    spans, lost = moa_of_plan(Plan(SHAPE, 32, ((rule,) * 4,) * 3, gates="0123456789abcdef"))
    assert spans.alphas[0][0] == 64.0
    assert lost == [
        "12 KV heads have another sink than 64 tokens, which is MoA's",
        "what the gates of 12 KV heads select is left out",
    ]


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([[1.0] * 4] * 2, r"shape \(2, 4\); the model has 3 layers of 4 heads"),
        ([[1.0] * 4, [1.0] * 4, [float("nan")] * 4], "not finite"),
        ([[1.0], [1.0] * 4, [1.0] * 4], "no table of numbers"),
        ([["a"] * 4] * 3, "no table of numbers"),
    ],
)
def test_what_is_no_pattern_is_refused(heads: list[list[float]], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_of_duo(DuoPattern(heads, 64, 256), SHAPE)
    for pattern, sparsity in ((DuoPattern([[1.0] * 4] * 3, 64, 0), None), (DuoPattern([[1.0] * 4] * 3, 64, 256), 1.5)):
        with pytest.raises(PlanError):
            plan_of_duo(pattern, SHAPE, sparsity)
