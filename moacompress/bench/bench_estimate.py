"""What a benchmark will take: how many prompts and steps its cells time, times what the model under the plan takes for them."""

from __future__ import annotations

from pathlib import Path

from moacompress.bench.bench_request import BenchRequest, check_fits, largest_cell
from moacompress.core.tables import readable_bytes, readable_seconds
from moacompress.estimate.estimate import Estimate
from moacompress.estimate.estimator import Estimator
from moacompress.estimate.work import Kind, Work
from moacompress.models.device import available_memory
from moacompress.models.stored_plan import stored_plan
from moacompress.runtime.checkpoint import compressed_folder, load_checkpoint

COMPILE_SECONDS = 20.0
"""Of compiling a decode step for one cell, about."""
PROCESS_SECONDS = 6.0
"""Of a process that measures the peak memory of one side, beside its prompt and steps."""


def bench_work(request: BenchRequest) -> list[Work]:
    """Returns what a benchmark runs, in all cells and on all sides; a row of a batch counts as a prompt of its own."""
    steps, prompts = (request.repeats + 1) * (request.tokens + 1), request.prefill_repeats + request.peak
    sides, found = len(request.sides), []
    for cell in request.cells():
        found.append(Work(Kind.FORWARD, cell.length, sides * prompts * cell.batch))
        found.append(Work(Kind.STEP, cell.length, sides * steps * cell.batch))
    return found


def estimate_bench(target: str | Path, request: BenchRequest) -> Estimate:
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
    estimator = Estimator(checkpoint.put_on(checkpoint.plan), request.device)
    compiled = ("dense_best" in request.sides) + request.compile * len({"plan", "full_span"} & {*request.sides})
    sides, cells = len(request.sides), len(list(request.cells()))
    beside = cells * (compiled * COMPILE_SECONDS + sides * request.peak * PROCESS_SECONDS)
    seconds = beside + estimator.seconds(bench_work(request))
    needed, _ = largest_cell(request, plan, folder)
    counted = "1 cell" if cells == 1 else f"{cells} cells"
    return Estimate(
        seconds=seconds,
        text=(
            f"about {readable_seconds(seconds)} for {counted} of {sides} sides, and about {readable_bytes(needed)} of memory; "
            "estimated as if every side were as fast as the plan.",
        ),
        facts={"cells": cells, "sides": sides, "peak_bytes": needed},
        slowdown=estimator.watch.slowdown,
    )
