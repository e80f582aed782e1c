"""`moacompress bench`: how fast a compressed model is, and what memory it takes, beside the dense one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from moacompress.cli.harness import CommandRun, Output, command
from moacompress.cli.options import Overwrite, TrustRemoteCode, dry_run_option, split_list
from moacompress.core.errors import UsageError

LENGTHS, QUICK_LENGTHS = "1k,4k", "1k"
TOKENS, QUICK_TOKENS = 16, 8
REPEATS, QUICK_REPEATS = 20, 7
PREFILL_REPEATS = 3


@command(
    "moacompress bench runs/mine --quick",
    "moacompress bench runs/mine --lengths 1k,4k --batch 1,8 --dtype float32,bfloat16 -o runs/mine/bench.json",
    "moacompress bench runs/mine/model --sides plan,dense --lengths 8k --prefill-repeats 0 --no-peak --json",
    "moacompress bench runs/mine --compile --pack --tokens 32 --repeats 40",
    computes=True,
)
def bench(
    run: CommandRun,
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Compressed model, or folder of a run.")],
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", metavar="LIST", help=f"Tokens in the cache of a row [default: {LENGTHS}]."),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="LIST", help="Rows, such as 1,8.")] = "1",
    sides: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="plan; full_span (the same kernels, all keys kept); dense (transformers as it is); dense_best (the "
            "faster of that and of a static cache with a compiled step).",
        ),
    ] = "plan,full_span,dense,dense_best",
    tokens: Annotated[
        int | None, typer.Option(help=f"Decode steps that are timed as one [default: {TOKENS}].", show_default=False)
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(help=f"Turns of decoding, every side once in each [default: {REPEATS}].", show_default=False),
    ] = None,
    prefill_repeats: Annotated[int, typer.Option(help="Turns of prefilling; 0 for none.")] = PREFILL_REPEATS,
    compile_ours: Annotated[
        bool, typer.Option("--compile", help="Compile the decode step of plan and full_span too.")
    ] = False,
    pack: Annotated[
        bool,
        typer.Option("--pack", help="Pack the weights of all sides (runtime.pack_weights); a second copy of them."),
    ] = False,
    peak: Annotated[
        bool, typer.Option("--peak/--no-peak", help="Measure peak memory, each side in a process of its own.")
    ] = True,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help=f"A small table: {QUICK_LENGTHS} tokens, {QUICK_REPEATS} turns of {QUICK_TOKENS} steps. Other options win.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Write the result here; a stopped run resumes from there."),
    ] = None,
    dry_run: Annotated[bool, dry_run_option("Say what it would take (time, memory), and measure nothing.")] = False,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Output:
    """Measure speed and memory of a compressed model beside the dense one.

    Time of a prompt and of a decode step, bytes of weights and cache, peak memory, and from which length on the plan is
    faster. Sides take turns, so that what else the machine does meets all alike. --dtype takes a list too.
    """
    recipe = CommandRun(replace(run.common, dtype=None), run.progress).recipe()  # --dtype is a list here
    batches = split_list(batch) or ()
    for item in batches:
        if not item.isdecimal():
            raise UsageError(f"batch {item!r} is not a number of rows; give some such as 1,8")

    from moacompress.bench.bench_request import BenchRequest
    from moacompress.rules.budget import parse_lengths

    request = BenchRequest(
        lengths=parse_lengths(lengths if lengths is not None else QUICK_LENGTHS if quick else LENGTHS),
        batches=tuple(sorted({int(item) for item in batches})),
        dtypes=split_list(run.common.dtype if run.common.dtype is not None else "auto") or (),
        sides=tuple(dict.fromkeys(split_list(sides) or ())),
        tokens=tokens if tokens is not None else QUICK_TOKENS if quick else TOKENS,
        repeats=repeats if repeats is not None else QUICK_REPEATS if quick else REPEATS,
        prefill_repeats=prefill_repeats,
        compile=compile_ours,
        pack=pack,
        peak=peak,
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
