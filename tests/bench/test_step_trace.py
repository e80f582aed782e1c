"""Traces of steps: every moment is in one phase, and results are as without one. Clocks are compared; no speed is asserted."""

import time
from dataclasses import replace

import pytest
import torch

from moacompress.bench.bench_request import BenchRequest, Cell
from moacompress.bench.benchmark import run_bench
from moacompress.bench.sides import DecodeTurn, filled_cache, random_ids
from moacompress.bench.step_trace import FRAMEWORK, trace_of, trace_steps
from moacompress.core.errors import UnsupportedError, UsageError
from moacompress.kernels.capabilities import PhaseTime
from moacompress.kernels.cpu import cpu_backend
from moacompress.kernels.cpu.cpu_backend import PHASES, CpuBackend
from moacompress.kernels.dispatch import REFERENCE
from moacompress.report.bench_tables import bench_tables
from moacompress.report.page.figures import speed_pictures
from moacompress.runtime import attach
from moacompress.runtime.compat.alternates import cache_argument
from tests import plan_kinds
from tests.conftest import tiny_model
from tests.printed import printed

CPU = CpuBackend()
STEPS, LENGTH, ROWS = 3, 160, 2
SLACK = 1e-6
"""Seconds by which sums of rounded numbers may differ."""
TRACED = BenchRequest(
    (96,), (2,), ("float32",), ("plan",), tokens=2, repeats=1, prefill_repeats=0, peak=False, trace=True
)
built = pytest.mark.skipif(not CPU.status().works, reason="the kernels are not built")


@pytest.fixture
def turn():
    """Steps under a plan with gates, large enough that an operator's call is small beside its work."""
    model = tiny_model(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, head_dim=64)
    plan = plan_kinds.gates(model)
    cell = Cell("float32", LENGTH, ROWS)
    compressed = attach(model, plan)
    filled = filled_cache("plan", compressed, plan, cell, STEPS, 0, "cpu")
    return DecodeTurn(compressed, filled, random_ids((STEPS + 1, ROWS, 1), 160, 1, "cpu"), LENGTH, "cpu")


def traced(turn):
    CPU.start_trace()
    turn.run()
    return CPU.stop_trace()


@built
def test_phases_are_all_of_the_time_in_operators_and_none_of_it_twice(turn, monkeypatch):
    spent = []

    def timed(call):
        def run(*arguments):
            begin = time.perf_counter()
            found = call(*arguments)
            spent.append(time.perf_counter() - begin)
            return found

        return run

    monkeypatch.setattr(cpu_backend._CpuCaches, "step", timed(cpu_backend._CpuCaches.step))
    monkeypatch.setattr(CpuBackend, "linear", timed(CpuBackend.linear))
    shares = []
    for _ in range(10):
        turn.prepare()
        spent.clear()  # what prepares the steps is not traced
        begin = time.perf_counter()
        phases = traced(turn)
        whole = time.perf_counter() - begin
        within, counted = sum(spent), sum(found.seconds for found in phases.values())
        assert len(spent) >= 2 * STEPS  # the layers and the head
        assert counted <= within + SLACK < whole
        shares.append(counted / within)
    assert max(shares) > 0.8  # the rest is the call of an operator; other programs may come between


@built
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_work_no_longer_than_a_phase_takes(turn, threads):
    torch.set_num_threads(threads)
    assert turn.routes == []
    turn.prepare()
    phases = traced(turn)
    assert turn.routes == ["all layers"]
    assert tuple(phases) == PHASES
    for name, (seconds, busy) in phases.items():
        assert 0 < busy <= threads * seconds + SLACK, name


@built
def test_results_are_those_without_a_trace_and_nothing_is_counted_then(turn):
    def logits():
        turn.prepare()
        with torch.no_grad():
            return turn.forward(input_ids=turn._ids[1], use_cache=True, **cache_argument(turn._cache)).logits

    plain = logits()
    CPU.start_trace()
    assert torch.equal(logits(), plain)
    assert sum(found.seconds for found in CPU.stop_trace().values()) > 0
    logits()
    assert all(found == PhaseTime(0, 0) for found in CPU.stop_trace().values())


def test_what_no_phase_has_is_the_frameworks():
    phases = {"attention": PhaseTime(0.4, 0.6), "head": PhaseTime(0.2, 0.4)}
    trace = trace_of(1.0, phases, 2, 2)
    assert [row["phase"] for row in trace["phases"]] == ["attention", "head", FRAMEWORK]
    for row, times in zip(trace["phases"], [(200, 300, 100), (100, 200, 0), (200, 200, 200)], strict=True):
        assert (row["ms"], row["busy_ms"], row["wait_ms"]) == pytest.approx(times)
    assert trace["step_ms"] == pytest.approx(500)
    assert sum(row["busy_ms"] + row["wait_ms"] for row in trace["phases"]) == pytest.approx(2 * trace["step_ms"])


@built
def test_the_median_turn_is_shown(turn):
    ticks = iter([0.0, 90.0, 100.0, 170.0, 200.0, 280.0])  # turns of 90, 70 and 80 s
    trace = trace_steps(turn, CPU, 3, lambda: next(ticks))
    assert trace["step_ms"] == pytest.approx(80e3 / STEPS)
    assert sum(row["ms"] for row in trace["phases"]) == pytest.approx(trace["step_ms"])


@built
def test_bench_shows_it_in_json_tables_and_a_picture(compressed):
    report = run_bench(compressed, TRACED)
    (row,) = report["runs"]
    assert [found["phase"] for found in row["trace"]["phases"]] == [*PHASES, FRAMEWORK]
    shown = printed(*bench_tables(report), width=200)
    assert "Where a step's time goes under this plan, 2 x 96 fp32" in shown
    assert all(name in shown for name in (*PHASES, FRAMEWORK))
    picture = speed_pictures(report)[-1]
    assert picture.name == "trace"
    assert sum(trace["x"][0] for trace in picture.traces) == pytest.approx(row["trace"]["step_ms"])
    assert [name for name, *_ in picture.rows] == [*PHASES, FRAMEWORK]
    untraced = run_bench(compressed, replace(TRACED, trace=False))
    assert untraced["runs"][0]["trace"] is None
    assert "trace" not in [picture.name for picture in speed_pictures(untraced)]


def test_what_cannot_be_traced_is_refused():
    for changes in ({"sides": ("dense",)}, {"compile": True}):
        with pytest.raises(UsageError, match="goes with plan among --sides, and without --compile"):
            replace(TRACED, **changes)
    with pytest.raises(UnsupportedError, match="start_trace"):
        REFERENCE.start_trace()
    with pytest.raises(UsageError, match="the kernels of reference cannot be traced; leave --trace out"):
        trace_steps(None, REFERENCE, 1)
