"""The fit of a step's time: it finds the times of a machine that is known, and never that keeping more takes less."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moacompress.core.errors import ArtefactError
from moacompress.rules.candidates import candidate_rules, gated_rules, in_formats
from moacompress.rules.formats import CODED
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import SINKS, Rule
from moacompress.rules.step_time import StepTime
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
