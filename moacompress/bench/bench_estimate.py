"""What a benchmark will take, from one timed prompt and step of every length under the plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moacompress.bench.bench_request import BenchRequest, check_fits, largest_cell
from moacompress.bench.benchmark import available_memory
from moacompress.core.stopwatch import busy_note
from moacompress.core.tables import readable_bytes, readable_seconds
from moacompress.evaluation.checkpoint import compressed_folder, load_checkpoint
from moacompress.evaluation.eval_estimate import timed_passes
from moacompress.models.device import stopwatch_on
from moacompress.models.stored_plan import stored_plan

COMPILE_SECONDS = 20.0
"""Of compiling a decode step for one cell, about."""
PROCESS_SECONDS = 6.0
"""Of a process that measures the peak memory of one side, beside its prompt and steps."""


@dataclass(frozen=True)
class BenchEstimate:
    """What a benchmark will take.

    Attributes:
        cells: places of its table.
        sides: that are timed in every cell.
        seconds: in all, alone on the machine.
        peak_bytes: of the largest cell.
        slowdown: how many times as long what was timed took beside whatever else ran then.
    """

    cells: int
    sides: int
    seconds: float
    peak_bytes: int
    slowdown: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {
            "estimate": True,
            "cells": self.cells,
            "sides": self.sides,
            "seconds": round(self.seconds, 1),
            "peak_bytes": self.peak_bytes,
            "slowdown": round(self.slowdown, 2),
        }

    def line(self) -> str:
        """Returns sentences for people."""
        cells = "1 cell" if self.cells == 1 else f"{self.cells} cells"
        busy = busy_note(self.seconds, self.slowdown)
        return " ".join(
            [
                f"It would take about {readable_seconds(self.seconds)} for {cells} of {self.sides} sides, and about "
                f"{readable_bytes(self.peak_bytes)} of memory; estimated as if every side were as fast as the plan.",
                *([] if busy is None else [busy]),
                "Nothing was measured.",
            ]
        )


def estimate_bench(target: str | Path, request: BenchRequest) -> BenchEstimate:
    """Estimates a benchmark after the checks of `run_bench`; nothing is written.

    Raises:
        UsageError: `target` is not compressed.
        DataError: a length beyond the model's context.
        MoaCompressError: not enough memory.
    """
    folder = compressed_folder(Path(target))
    plan = stored_plan(folder)
    request = request.resolved(plan.model)
    check_fits(request, plan, folder, available_memory(request.device))
    checkpoint = load_checkpoint(folder, request.dtypes[0], request.device, trust_remote_code=request.trust_remote_code)
    watch = stopwatch_on(request.device)
    forward, decode = timed_passes(checkpoint.put_on(checkpoint.plan), request.lengths, request.device, watch)
    compiled = ("dense_best" in request.sides) + request.compile * len({"plan", "full_span"} & {*request.sides})
    sides, seconds, cells = len(request.sides), 0.0, list(request.cells())
    for cell in cells:
        prompt, step = cell.batch * forward[cell.length], cell.batch * decode[cell.length]
        seconds += sides * (request.repeats + 1) * (request.tokens + 1) * step + compiled * COMPILE_SECONDS
        seconds += sides * request.prefill_repeats * prompt
        seconds += sides * (PROCESS_SECONDS + prompt) if request.peak else 0.0
    needed, _ = largest_cell(request, plan, folder)
    return BenchEstimate(len(cells), sides, seconds, needed, watch.slowdown)
