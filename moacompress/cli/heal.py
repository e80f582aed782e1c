"""`moacompress heal`: fits the weights to the plan by a short distillation from the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moacompress.cli.harness import CommandRun, Output, command
from moacompress.cli.options import AllowOverlap


@command(
    "moacompress heal runs/mine -o healed/",
    "moacompress heal model/ -o healed/ --profile profile/ --teacher path/to/model --dry-run",
    "moacompress heal runs/mine -o healed/ --train full --lr 2e-5 --steps 200 --max-minutes 30",
    "moacompress heal runs/mine -o healed/ --objective echoatt --samples 200 --text prose/ --json",
    settings=(
        "heal.objective",
        "heal.train",
        "heal.samples",
        "heal.lengths",
        "calibration.text",
        "heal.steps",
        "heal.max_minutes",
        "heal.batch",
        "heal.lr",
        "heal.modules",
        "seed",
        "device",
        "dtype",
    ),
    takes=("recipe", "settings", "dry_run", "overwrite", "trust_remote_code"),
    computes=True,
    shared=True,
)
def heal(
    run: CommandRun,
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Compressed model, or the folder of a run.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write the healed checkpoint to.")],
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Profile of the dense model; its validation samples are held out. Default: the run's own.",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The dense model. Default: the one that was profiled."),
    ] = None,
    allow_overlap: AllowOverlap = False,
) -> Output:
    """Distil the weights of a compressed model from the dense one.

    The plan does not change, except for its gates if those are trained. The state with the lowest KL to the dense model on
    held-out samples is written; if no step improved on the start, that is the start. --dtype sets the compute dtype (float32 on
    a CPU, otherwise bfloat16); weights are trained in float32.
    Under torchrun (torchrun --standalone --nproc-per-node 2 -m moacompress heal ...) the processes share the samples.
    """
    inputs: dict[str, Any] = {"profile": profile, "teacher": teacher, "recipe": run.recipe(), **run.how}
    if run.common.dry_run:
        from moacompress.healer.heal_estimate import estimate_heal

        expected = estimate_heal(path, out, **inputs)
        return Output(expected.to_dict(), list(expected.lines()))

    from moacompress.healer.healing import heal as heal_model
    from moacompress.report.heal_tables import heal_tables

    healed = heal_model(path, out, allow_overlap=allow_overlap, **inputs)
    data = {"model": str(healed.folder), **healed.notes, "losses": list(healed.losses)}
    return Output(data, heal_tables(healed.folder, healed.notes))
