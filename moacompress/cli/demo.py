"""`moacompress demo`: the whole way on a small real model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moacompress.cli.harness import CommandRun, Output, command
from moacompress.cli.options import Overwrite, TrustRemoteCode
from moacompress.core.errors import DataError

MODEL_FILE = "SmolLM2-135M-Instruct*.gguf"
SQUAD_FILE = "squad.json"


@command(
    "moacompress demo -o runs/demo",
    "moacompress demo -o runs/demo --data .cache --json",
    computes=True,
)
def demo(
    run: CommandRun,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Folder of the run.")] = Path("runs/demo"),
    data: Annotated[Path, typer.Option(metavar="DIR", help="Where `make test-data` put model and data.")] = Path(
        ".cache"
    ),
    model: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The model (folder or .gguf) instead of the one in --data.")
    ] = None,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Output:
    """Compress a small real model, start to end.

    SmolLM2-135M-Instruct keeps a quarter of its KV cache and is measured, on a laptop's CPU. --dtype is that of the checkpoint,
    bfloat16 by default; profiling and searching compute in float32.
    """
    model = model or _find(data, MODEL_FILE)
    squad = _find(data, SQUAD_FILE)

    from moacompress.demo.smollm2 import run_demo
    from moacompress.report.summary_tables import closing_lines, summary_tables

    summary = run_demo(
        out,
        model,
        squad,
        dtype=run.common.dtype or "auto",
        device=run.common.device or "cpu",
        seed=run.common.seed,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        progress=run.progress,
    )
    return Output(
        summary,
        [
            *summary_tables(summary),
            *closing_lines(out),
        ],
    )


def _find(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(f"**/{pattern}"))
    if not found:
        raise DataError(
            f"no {pattern} in {folder}; fetch it with `make test-data`, or say where with --data or --model"
        )
    return found[0]
