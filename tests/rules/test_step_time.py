"""The fit of a step's time: it finds the times of a machine that is known, and never that keeping more takes less."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moacompress.core.errors import ArtefactError, PlanError
from moacompress.rules.candidates import candidate_rules, gated_rules, in_formats
from moacompress.rules.formats import CODED
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import SINKS, Rule
from moacompress.rules.step_time import StepTime, step_lines
from tests.cost_tables import BASES, FLOOR, GATE, SLOPES, known_ns, known_table, read

SHAPE = ModelShape("llama", 3, 4, 2, 16, "float32", (None, 64, None), "0123456789abcdef")


def fitted(noise: float = 0.0, length: int = 1024, rows: int = 4) -> StepTime:
    cell = read(known_table(SHAPE, (length,), (rows,), noise)).find_cell(length, rows)
    assert cell is not None
    return StepTime.fit(cell)


def random_plan(seed: int) -> Plan:
    random = np.random.default_rng(seed)
    spans = (*candidate_rules(1024, SINKS, 16), *gated_rules(1024, SINKS, 16))
    rules = in_formats(spans, CODED)
    rows = tuple(
        tuple(
            rule if native is None else rule.without_choice()
            for rule in (rules[int(random.integers(len(rules)))] for _ in range(SHAPE.kv_heads))
        )
        for native in SHAPE.native_windows
    )
    return Plan(SHAPE, 16, rows, gates="0" * 16)


@pytest.mark.parametrize("seed", range(6))
def test_known_times_are_found(seed: int) -> None:
    """Within the whole nanoseconds that every head is counted in."""
    step, plan = fitted(), random_plan(seed)
    assert step.floor_ms == pytest.approx(FLOOR / 1e6, rel=1e-6)
    assert step.full_span_ms == pytest.approx(known_ns(Plan.full(SHAPE), 1024, 4) / 1e6)
    heads = SHAPE.layers * SHAPE.kv_heads
    assert 0 <= step.step_ms(plan) * 1e6 - known_ns(plan, 1024, 4) < heads + 10
    assert step.fit_error < 1e-6
    assert step.check_error is not None
    assert step.check_error < 1e-6


def test_times_of_pairs() -> None:
    step = fitted(rows=1)
    assert step.gate is not None
    assert step.gate == pytest.approx(GATE, rel=1e-4)
    for keys, values, slope in step.pair_rows():
        assert slope == pytest.approx(SLOPES[keys] + SLOPES[values], rel=1e-6)
        base = step.keys[keys].base + step.values[values].base
        assert base == pytest.approx(BASES[keys] + BASES[values], abs=1.0)


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.3])
def test_more_tokens_never_take_less(noise: float) -> None:
    step = fitted(noise)
    rules = [Rule(4, alpha, 0, keys, values) for keys in BASES for values in BASES for alpha in (16, 64, 256, 1024)]
    found = step.head_ns(rules, 16, None).reshape(-1, 4)
    assert (found >= 0).all()
    assert (np.diff(found, axis=1) >= 0).all()
    assert step.floor_ms >= 0


def test_errors_are_those_of_the_noise() -> None:
    step = fitted(0.02)
    assert 0.001 < step.fit_error < 0.1
    assert step.check_error is not None
    assert step.check_error < 0.1


def test_one_plan_that_was_slowed_down_does_not_bend_the_others() -> None:
    data = known_table(SHAPE, (1024,), (4,))
    points = data["cells"][0]["points"]
    (slow,) = (point for point in points if point["name"] == "int8/int8, 0.25")
    slow["ms"] *= 1.4
    step, honest = StepTime.fit(read(data).cells[0]), fitted()
    assert step.fit_error == pytest.approx(1 - 1 / 1.4, abs=1e-3)
    assert step.median_error < 1e-3
    for seed in range(6):
        assert step.step_ms(random_plan(seed)) == pytest.approx(honest.step_ms(random_plan(seed)), rel=2e-3)


def test_what_was_not_measured_is_refused() -> None:
    data: dict[str, Any] = known_table(SHAPE, (1024,), (4,))
    cell = data["cells"][0]
    cell["points"] = [
        point
        for point in cell["points"]
        if not any(
            group["gated"] or "int4" in (group["key_format"], group["value_format"]) for group in point["groups"]
        )
    ]
    step = StepTime.fit(read(data).cells[0])
    assert step.gate is None
    assert step.check_error is None
    assert step.head_ns([Rule(4, 64, 0, "int8", "native")], 16, None)[0] > 0
    with pytest.raises(ArtefactError, match="not measured the format int4"):
        step.head_ns([Rule(4, 64, 0, "int8", "int4")], 16, None)
    with pytest.raises(ArtefactError, match="not measured gates"):
        step.head_ns([Rule(4, 64, 0, select_alpha=32)], 16, None)


STEP_MS: dict[str, dict[str, float | None]] = {
    "8192x8": {"predicted": 74.114, "full_span": 185.27, "floor": 24.59, "limit": 74.5, "error": 0.026},
    "4096x32": {"predicted": 80.0, "full_span": 160.0, "floor": 30.0, "limit": None, "error": None},
}


def noted(step_ms: Any) -> dict[str, Any]:
    plan = Plan.uniform(SHAPE, Rule(4, 64, 0), 16).with_notes(budget={"asked": ["latency=0.4@8kx8"], "bytes": {}})
    data = plan.to_dict()
    data["budget"]["step_ms"] = step_ms
    return data


def test_a_plan_says_what_its_step_is_predicted_to_take() -> None:
    from rich.console import Console

    from moacompress.exporter.card import model_card
    from moacompress.report.inspection import inspect_plan, overview
    from moacompress.report.page.findings import Findings
    from moacompress.report.page.report_page import about

    plan = Plan.from_dict(noted(STEP_MS))
    assert plan.budget["step_ms"] == STEP_MS
    lines = step_lines(STEP_MS)
    assert lines == [
        "A step of 8 rows at 8k tokens: 74.11 ms predicted, at most 74.5 by the budget; full span 185.3, weights alone 24.59; "
        "plans that were not fitted are off by up to 2.6%.",
        "A step of 32 rows at 4k tokens: 80 ms predicted; full span 160, weights alone 30.",
    ]
    console = Console(width=1000, file=io.StringIO())
    data = inspect_plan(plan, [512])
    console.print(overview(plan, data))
    shown = [model_card(plan), console.file.getvalue(), about(Findings(Path("run"), plan))]  # type: ignore[attr-defined]
    assert data["step_ms"] == STEP_MS
    for text in shown:
        assert all(line in text for line in lines)
    assert plan.in_dtype(plan.model.dtype).budget["step_ms"] == STEP_MS
    assert "step_ms" not in plan.in_dtype("bfloat16").budget
    bare = Plan.uniform(SHAPE, Rule(4, 64, 0), 16)
    assert "step" not in overview(bare, inspect_plan(bare, [512])).renderables[0].plain  # type: ignore[union-attr]
    assert "A step of" not in model_card(bare)


@pytest.mark.parametrize(
    ("step_ms", "words"),
    [
        ([], "must be an object"),
        ({"8kx8": STEP_MS["8192x8"]}, "lengths and rows such as '8192x8'"),
        ({"0x8": STEP_MS["8192x8"]}, "lengths and rows such as '8192x8'"),
        ({f"{n}x1": STEP_MS["8192x8"] for n in range(1, 300)}, "at most 256"),
        ({"8192x8": {**STEP_MS["8192x8"], "predicted": "fast"}}, "predicted"),
        ({"8192x8": {**STEP_MS["8192x8"], "predicted": -1.0}}, "predicted"),
        ({"8192x8": {"predicted": 1.0}}, "lacks the key 'full_span'"),
        ({"8192x8": {**STEP_MS["8192x8"], "more": 1}}, "unknown key 'more'"),
    ],
)
def test_notes_that_nobody_may_trust(step_ms: Any, words: str) -> None:
    with pytest.raises(PlanError, match=re.escape(words)):
        Plan.from_dict(noted(step_ms))
