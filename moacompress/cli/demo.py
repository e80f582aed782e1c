"""`moacompress demo`: a whole run on a small real model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moacompress.cli.harness import CommandRun, Output, command
from moacompress.core.errors import DataError

MODEL_FILE = "SmolLM2-135M-Instruct*.gguf"
SQUAD_FILE = "squad.json"


@command(
    "moacompress demo -o runs/demo",
    "moacompress demo -o runs/demo --data .cache --json",
    settings=("seed", "device", "dtype"),
    takes=("overwrite", "trust_remote_code"),
    computes=True,
)
def demo(
    run: CommandRun,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Folder to write the run to.")] = Path(
        "runs/demo"
    ),
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder that `make test-data` filled with the model and data.")
    ] = Path(".cache"),
    model: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Model (folder or .gguf) to use instead of the one in --data.")
    ] = None,
) -> Output:
    """Compress a small real model from start to end.

    Compresses the KV cache of SmolLM2-135M-Instruct to a quarter and evaluates it, on a laptop's CPU. --dtype sets the
    checkpoint's dtype (bfloat16 by default); profiling and searching compute in float32.
    """
    model = model or _find(data, MODEL_FILE)
    squad = _find(data, SQUAD_FILE)

    from moacompress.demo.smollm2 import run_demo
    from moacompress.report.summary_tables import closing_lines, summary_tables

    recipe = run.recipe()
    summary = run_demo(
        out,
        model,
        squad,
        dtype=recipe.dtype,
        device=recipe.device,
        seed=run.given.get("seed"),
        **run.how,
    )
    return Output(summary, [*summary_tables(summary), *closing_lines(out)])


def _find(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(f"**/{pattern}"))
    if not found:
        raise DataError(
            f"no {pattern} in {folder}; fetch it with `make test-data`, or say where it is with --data or --model"
        )
    return found[0]
