"""`moacompress bench`: measures speed and memory of a compressed model, beside the dense one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from moacompress.cli.harness import CommandRun, Output, command
from moacompress.cli.options import (
    Overwrite,
    TrustRemoteCode,
    batch_sizes,
    dry_run_option,
    split_list,
)

LENGTHS, QUICK_LENGTHS = "1k,4k", "1k"
TOKENS, QUICK_TOKENS = 16, 8
REPEATS, QUICK_REPEATS = 20, 7
PREFILL_REPEATS = 3
SIDES, SERVED = "plan,full_span,dense,dense_best", "dense,plan"


@command(
    "moacompress bench runs/mine --quick",
    "moacompress bench runs/mine --lengths 1k,4k --batch 1,8 --dtype float32,bfloat16 -o runs/mine/bench.json",
    "moacompress bench runs/mine/model --sides plan,dense --lengths 8k --prefill-repeats 0 --no-peak --json",
    "moacompress bench runs/mine --compile --tokens 32 --repeats 40",
    "moacompress bench runs/mine --sides plan --lengths 256,4k --prefill-repeats 0 --trace",
    "moacompress bench runs/mine --serve --kv-memory 128M --dtype bfloat16 -o runs/mine/serve.json",
    "moacompress bench runs/mine --serve --requests 96 --prompt 1000 --new 512 --json",
    computes=True,
)
def bench(
    run: CommandRun,
    path: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Compressed model, or the folder of a run."),
    ],
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", metavar="LIST", help=f"Tokens in the cache of each row [default: {LENGTHS}]."),
    ] = None,
    batch: Annotated[
        str | None, typer.Option(metavar="LIST", help="Batch sizes, such as 1,8 [default: 1].", show_default=False)
    ] = None,
    sides: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="plan; full_span (our kernels, all keys kept); dense (stock transformers); dense_best (the faster of stock "
            f"transformers and a static cache with a compiled step) [default: {SIDES}; with --serve {SERVED}].",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help=f"Decode steps per timed turn [default: {TOKENS}].", show_default=False)
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(help=f"Decode turns; each times every side once [default: {REPEATS}].", show_default=False),
    ] = None,
    prefill_repeats: Annotated[
        int | None,
        typer.Option(help=f"Prefill turns; 0 skips prefill [default: {PREFILL_REPEATS}].", show_default=False),
    ] = None,
    compile_ours: Annotated[
        bool, typer.Option("--compile", help="Also compile the decode step of plan and full_span.")
    ] = False,
    peak: Annotated[
        bool, typer.Option("--peak/--no-peak", help="Measure peak memory, each side in its own process.")
    ] = True,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace", help="Break down the time of a decode step under the plan by phase, in separate turns."
        ),
    ] = False,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help=f"A small table: {QUICK_LENGTHS} tokens, {QUICK_REPEATS} turns of {QUICK_TOKENS} steps. Options override it.",
        ),
    ] = False,
    serve: Annotated[
        bool,
        typer.Option(
            "--serve",
            help="Instead of the table: serve a mix of requests with the plan and with the dense model in the same KV memory, "
            "running as many at a time as fit.",
        ),
    ] = False,
    kv_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="KV memory for --serve [default: 128M].", show_default=False),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(help="Number of requests for --serve [default: 48].", show_default=False)
    ] = None,
    prompt: Annotated[
        int | None, typer.Option(help="Prompt tokens per request for --serve. Default: random lengths.")
    ] = None,
    new: Annotated[
        int | None, typer.Option(help="New tokens per request for --serve. Default: random lengths.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Mean requests per second for --serve, arriving at random. Default: all at once."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Write the result here; a stopped run resumes from this file."
        ),
    ] = None,
    dry_run: Annotated[bool, dry_run_option("Estimate time and memory; measure nothing.")] = False,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Output:
    """Measure speed and memory of a compressed model beside the dense one.

    Reports prefill and decode times, bytes of weights and cache, peak memory, and the length from which the plan is faster.
    Sides take turns, so that other load on the machine affects all of them equally; a speed-up is the median of the turns'
    ratios. --dtype also takes a list.
    """
    recipe = CommandRun(replace(run.common, dtype=None), run.progress).recipe()  # --dtype is a list here
    dtypes = split_list(run.common.dtype if run.common.dtype is not None else "auto") or ()
    if serve:
        from moacompress.bench.request_mix import ANSWERS, PROMPTS
        from moacompress.bench.serve_benchmark import ServeRequest, run_serving
        from moacompress.report.bench_tables import serve_tables
        from moacompress.rules.budget import parse_bytes

        served = ServeRequest(
            count=48 if requests is None else requests,
            kv_memory=parse_bytes(kv_memory or "128M"),
            prompt=PROMPTS if prompt is None else prompt,
            new=ANSWERS if new is None else new,
            rate=rate,
            sides=tuple(dict.fromkeys(split_list(sides or SERVED) or ())),
            dtypes=dtypes,
            seed=recipe.seed,
            device=recipe.device,
            trust_remote_code=trust_remote_code,
        )
        report = run_serving(path, served, out=out, overwrite=overwrite, progress=run.progress)
        return Output(report, serve_tables(report))
    from moacompress.bench.bench_request import BenchRequest
    from moacompress.rules.budget import parse_lengths

    request = BenchRequest(
        lengths=parse_lengths(lengths if lengths is not None else QUICK_LENGTHS if quick else LENGTHS),
        batches=batch_sizes(batch or "1"),
        dtypes=dtypes,
        sides=tuple(dict.fromkeys(split_list(SIDES if sides is None else sides) or ())),
        tokens=tokens if tokens is not None else QUICK_TOKENS if quick else TOKENS,
        repeats=repeats if repeats is not None else QUICK_REPEATS if quick else REPEATS,
        prefill_repeats=PREFILL_REPEATS if prefill_repeats is None else prefill_repeats,
        compile=compile_ours,
        peak=peak,
        trace=trace,
        seed=recipe.seed,
        device=recipe.device,
        trust_remote_code=trust_remote_code,
    )

    if dry_run:
        from moacompress.bench.bench_estimate import estimate_bench

        expected = estimate_bench(path, request)
        return Output(expected.to_dict(), [f"It would take {expected.line()} Nothing was measured."])

    from moacompress.bench.benchmark import run_bench
    from moacompress.report.bench_tables import bench_tables

    report = run_bench(path, request, out=out, overwrite=overwrite, progress=run.progress)
    return Output(report, bench_tables(report))
