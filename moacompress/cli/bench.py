"""`moacompress bench`: measures speed and memory of a compressed model, beside the dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moacompress.cli.harness import CommandRun, Output, command
from moacompress.cli.options import batch_sizes, split_list
from moacompress.rules.budget import parse_bytes, parse_lengths

SIDES, SERVED = "plan,full_span,dense,dense_best", "dense,plan"
LENGTHS, TOKENS, REPEATS = "1k,4k", 16, 20
QUICK_LENGTHS, QUICK_TOKENS, QUICK_REPEATS = "1k", 8, 7

Lengths = Annotated[
    str | None,
    typer.Option("--lengths", metavar="LIST", help=f"Tokens in the cache of each row [default: {LENGTHS}]."),
]
Batches = Annotated[str, typer.Option(metavar="LIST", help="Batch sizes, such as 1,8.")]
Dtypes = Annotated[
    str, typer.Option(metavar="LIST", help="Compute dtypes, such as float32,bfloat16; auto for the checkpoint's own.")
]
Sides = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="plan; full_span (our kernels, all keys kept); dense (stock transformers); dense_best (the faster of stock "
        f"transformers and a static cache with a compiled step) [default: {SIDES}; with --serve {SERVED}].",
    ),
]
Tokens = Annotated[int | None, typer.Option(help=f"Decode steps per timed turn [default: {TOKENS}].")]
Repeats = Annotated[int | None, typer.Option(help=f"Decode turns; each times every side once [default: {REPEATS}].")]
PrefillRepeats = Annotated[int, typer.Option(help="Prefill turns; 0 skips prefill.")]
Compile = Annotated[bool, typer.Option("--compile", help="Also compile the decode step of plan and full_span.")]
Peak = Annotated[bool, typer.Option("--peak/--no-peak", help="Measure peak memory, each side in its own process.")]
Trace = Annotated[
    bool,
    typer.Option("--trace", help="Break down the time of a decode step under the plan by phase, in separate turns."),
]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick",
        help=f"A small table: {QUICK_LENGTHS} tokens, {QUICK_REPEATS} turns of {QUICK_TOKENS} steps. Options override it.",
    ),
]
Serve = Annotated[
    bool,
    typer.Option(
        "--serve",
        help="Instead of the table: serve a mix of requests with the plan and with the dense model in the same KV memory, "
        "running as many at a time as fit.",
    ),
]
KvMemory = Annotated[str, typer.Option(metavar="SIZE", help="KV memory for --serve.")]
Requests = Annotated[int, typer.Option(help="Number of requests for --serve.")]
PromptTokens = Annotated[
    int | None, typer.Option(help="Prompt tokens per request for --serve. Default: random lengths.")
]
NewTokens = Annotated[int | None, typer.Option(help="New tokens per request for --serve. Default: random lengths.")]
Rate = Annotated[
    float | None,
    typer.Option(help="Mean requests per second for --serve, arriving at random. Default: all at once."),
]
OutFile = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FILE", help="Write the result here; a stopped run resumes from this file."),
]


@command(
    "moacompress bench runs/mine --quick",
    "moacompress bench runs/mine --lengths 1k,4k --batch 1,8 --dtype float32,bfloat16 -o runs/mine/bench.json",
    "moacompress bench runs/mine/model --sides plan,dense --lengths 8k --prefill-repeats 0 --no-peak --json",
    "moacompress bench runs/mine --compile --tokens 32 --repeats 40",
    "moacompress bench runs/mine --sides plan --lengths 256,4k --prefill-repeats 0 --trace",
    "moacompress bench runs/mine --serve --kv-memory 128M --dtype bfloat16 -o runs/mine/serve.json",
    "moacompress bench runs/mine --serve --requests 96 --prompt 1000 --new 512 --json",
    settings=("seed", "device"),
    takes=("dry_run", "overwrite", "trust_remote_code"),
    computes=True,
)
def bench(
    run: CommandRun,
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Compressed model, or the folder of a run.")],
    lengths: Lengths = None,
    batch: Batches = "1",
    dtype: Dtypes = "auto",
    sides: Sides = None,
    tokens: Tokens = None,
    repeats: Repeats = None,
    prefill_repeats: PrefillRepeats = 3,
    compile_ours: Compile = False,
    peak: Peak = True,
    trace: Trace = False,
    quick: Quick = False,
    serve: Serve = False,
    kv_memory: KvMemory = "128M",
    requests: Requests = 48,
    prompt: PromptTokens = None,
    new: NewTokens = None,
    rate: Rate = None,
    out: OutFile = None,
) -> Output:
    """Measure speed and memory of a compressed model beside the dense one.

    Reports prefill and decode times, bytes of weights and cache, peak memory, and the length from which the plan is faster.
    Sides take turns, so that other load on the machine affects all of them equally; a speed-up is the median of the turns'
    ratios.
    """
    recipe = run.recipe()
    given = SERVED if serve and sides is None else SIDES if sides is None else sides
    asked: dict[str, Any] = {
        "sides": tuple(dict.fromkeys(split_list(given) or ())),
        "dtypes": split_list(dtype) or (),
        "seed": recipe.seed,
        "device": recipe.device,
        "trust_remote_code": run.common.trust_remote_code,
    }
    if serve:
        mix = {"count": requests, "prompt": prompt, "new": new, "rate": rate}
        asked |= {name: value for name, value in mix.items() if value is not None}
        return _serving(run, path, out, kv_memory, asked)
    asked |= {
        "batches": batch_sizes(batch),
        "tokens": tokens if tokens is not None else QUICK_TOKENS if quick else TOKENS,
        "repeats": repeats if repeats is not None else QUICK_REPEATS if quick else REPEATS,
        "prefill_repeats": prefill_repeats,
        "compile": compile_ours,
        "peak": peak,
        "trace": trace,
    }
    return _table(run, path, out, lengths if lengths is not None else QUICK_LENGTHS if quick else LENGTHS, asked)


def _serving(run: CommandRun, path: Path, out: Path | None, kv_memory: str, asked: dict[str, Any]) -> Output:
    from moacompress.bench.serve_benchmark import ServeRequest, run_serving
    from moacompress.report.bench_tables import serve_tables

    request = ServeRequest(kv_memory=parse_bytes(kv_memory), **asked)
    report = run_serving(path, request, out=out, overwrite=run.common.overwrite, progress=run.progress)
    return Output(report, serve_tables(report))


def _table(run: CommandRun, path: Path, out: Path | None, lengths: str, asked: dict[str, Any]) -> Output:
    from moacompress.bench.bench_request import BenchRequest

    request = BenchRequest(lengths=parse_lengths(lengths), **asked)
    if run.common.dry_run:
        from moacompress.bench.bench_estimate import estimate_bench

        expected = estimate_bench(path, request)
        return Output(expected.to_dict(), [f"It would take {expected.line()} Nothing was measured."])

    from moacompress.bench.benchmark import run_bench
    from moacompress.report.bench_tables import bench_tables

    report = run_bench(path, request, out=out, overwrite=run.common.overwrite, progress=run.progress)
    return Output(report, bench_tables(report))
