"""What a benchmark will take: how many prompts and steps its cells time, times the rates of the model under the plan."""

from __future__ import annotations

from pathlib import Path

from moacompress.bench.bench_request import BenchRequest, check_fits, largest_cell
from moacompress.core.tables import readable_bytes, readable_seconds
from moacompress.estimate.estimate import Estimate
from moacompress.estimate.rates import TimedRates
from moacompress.models.device import available_memory
from moacompress.models.stored_plan import stored_plan
from moacompress.runtime.checkpoint import compressed_folder, load_checkpoint

COMPILE_SECONDS = 20.0
"""Of compiling a decode step for one cell, about."""
PROCESS_SECONDS = 6.0
"""Of a process that measures the peak memory of one side, beside its prompt and steps."""


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
    rates = TimedRates(checkpoint.put_on(checkpoint.plan), request.device)
    compiled = ("dense_best" in request.sides) + request.compile * len({"plan", "full_span"} & {*request.sides})
    sides, cells = len(request.sides), list(request.cells())
    seconds = compiled * COMPILE_SECONDS * len(cells)
    for cell in cells:
        prompt, step = cell.batch * rates.forward(cell.length), cell.batch * rates.step(cell.length)
        steps, prompts = (request.repeats + 1) * (request.tokens + 1), request.prefill_repeats + request.peak
        seconds += sides * (steps * step + prompts * prompt + request.peak * PROCESS_SECONDS)
    needed, _ = largest_cell(request, plan, folder)
    counted = "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
    return Estimate(
        seconds=seconds,
        text=(
            f"about {readable_seconds(seconds)} for {counted} of {sides} sides, and about {readable_bytes(needed)} of memory; "
            "estimated as if every side were as fast as the plan.",
        ),
        facts={"cells": len(cells), "sides": sides, "peak_bytes": needed},
        slowdown=rates.watch.slowdown,
    )
