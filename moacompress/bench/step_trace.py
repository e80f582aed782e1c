"""Where the time of a decode step goes: its phases in the compiled kernels, and what is left for Python and the framework.

Steps are traced by the backend in turns of their own: a trace reads the clock some times a layer, so the times without one are
those of the benchmark. Every moment of a step counts for one phase. Within it threads work or wait: `wait_ms` is what they
waited for each other, for work, or while one of them alone was at work, added up over the threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from moacompress.bench.sides import DecodeTurn
from moacompress.core.errors import UsageError
from moacompress.kernels.backend import Backend
from moacompress.kernels.capabilities import PhaseTime

FRAMEWORK = "Python and framework"
"""What of a step is in no phase of the kernels."""


def trace_steps(
    turn: DecodeTurn, backend: Backend, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Traces the steps of a turn that is not compiled, several times, and returns the trace of the turn of median time.

    It has `threads`, `step_ms` (mean of the turn's steps) and `phases`: of each `phase`, its time of a step `ms`, and of all
    threads together `busy_ms` and `wait_ms`. The `ms` add up to `step_ms`.

    Raises:
        UsageError: the backend cannot trace.
    """
    if not backend.capabilities.trace:
        raise UsageError(f"the kernels of {backend.name} cannot be traced; leave --trace out")
    turns = []
    for _ in range(repeats):
        turn.prepare()
        backend.start_trace()
        try:
            begin = clock()
            turn.run()
            seconds = clock() - begin
        finally:
            phases = backend.stop_trace()
        turns.append((seconds, phases))
    seconds, phases = sorted(turns, key=lambda found: found[0])[len(turns) // 2]
    return trace_of(seconds, phases, turn.steps, torch.get_num_threads())


def trace_of(seconds: float, phases: Mapping[str, PhaseTime], steps: int, threads: int) -> dict[str, Any]:
    """Returns a trace of so many steps, which took `seconds` together.

    What the kernels did not count is `FRAMEWORK`, in which one thread is at work.
    """
    outside = max(0.0, seconds - sum(found.seconds for found in phases.values()))
    rows = []
    for name, (wall, busy) in {**phases, FRAMEWORK: PhaseTime(outside, outside)}.items():
        waited = max(0.0, wall * threads - busy)
        times = {"ms": wall, "busy_ms": busy, "wait_ms": waited}
        rows.append({"phase": name, **{unit: value / steps * 1e3 for unit, value in times.items()}})
    return {"threads": threads, "step_ms": sum(row["ms"] for row in rows), "phases": rows}
