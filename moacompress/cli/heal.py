"""`moacompress heal`: fits the weights to the plan by a short distillation from the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moacompress.cli.harness import CommandRun, Output, command
from moacompress.cli.options import AllowOverlap, Overwrite, RecipeFile, Text, TrustRemoteCode, dry_run_option
from moacompress.cli.recipe_options import recipe_option


@command(
    "moacompress heal runs/mine -o healed/",
    "moacompress heal model/ -o healed/ --profile profile/ --teacher path/to/model --dry-run",
    "moacompress heal runs/mine -o healed/ --train full --lr 2e-5 --steps 200 --max-minutes 30",
    "moacompress heal runs/mine -o healed/ --objective echoatt --samples 200 --text prose/ --json",
    computes=True,
    shared=True,
)
def heal(
    run: CommandRun,
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Compressed model, or the folder of a run.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write the healed checkpoint to.")],
    recipe: RecipeFile = None,
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
    objective: Annotated[str | None, recipe_option("heal.objective")] = None,
    train: Annotated[str | None, recipe_option("heal.train")] = None,
    samples: Annotated[int | None, recipe_option("heal.samples")] = None,
    lengths: Annotated[str | None, recipe_option("heal.lengths", metavar="LIST")] = None,
    text: Text = None,
    steps: Annotated[int | None, recipe_option("heal.steps")] = None,
    max_minutes: Annotated[float | None, recipe_option("heal.max_minutes")] = None,
    batch: Annotated[int | None, recipe_option("heal.batch")] = None,
    lr: Annotated[float | None, recipe_option("heal.lr")] = None,
    rank: Annotated[int | None, recipe_option("heal.rank")] = None,
    modules: Annotated[str | None, recipe_option("heal.modules", metavar="LIST")] = None,
    hidden_weight: Annotated[float | None, recipe_option("heal.hidden_weight")] = None,
    soft_weight: Annotated[float | None, recipe_option("heal.soft_weight")] = None,
    hard_weight: Annotated[float | None, recipe_option("heal.hard_weight")] = None,
    evaluations: Annotated[int | None, recipe_option("heal.evaluations")] = None,
    patience: Annotated[int | None, recipe_option("heal.patience")] = None,
    held_out: Annotated[int | None, recipe_option("heal.held_out")] = None,
    checkpointing: Annotated[bool | None, recipe_option("heal.checkpointing")] = None,
    allow_overlap: AllowOverlap = False,
    dry_run: Annotated[bool, dry_run_option("Estimate tokens, time and memory; train nothing.")] = False,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Output:
    """Distil the weights of a compressed model from the dense one.

    The plan does not change, except for its gates if those are trained. The state with the lowest KL to the dense model on
    held-out samples is written; if no step improved on the start, that is the start. --dtype sets the compute dtype (float32 on
    a CPU, otherwise bfloat16); weights are trained in float32.
    Under torchrun (torchrun --standalone --nproc-per-node 2 -m moacompress heal ...) the processes share the samples.
    """
    resolved = run.recipe(recipe)
    if dry_run:
        from moacompress.healer.heal_estimate import estimate_heal

        expected = estimate_heal(
            path,
            out,
            profile=profile,
            teacher=teacher,
            recipe=resolved,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=run.progress,
        )
        return Output(expected.to_dict(), list(expected.lines()))

    from moacompress.healer.healing import heal as heal_model

    healed = heal_model(
        path,
        out,
        profile=profile,
        teacher=teacher,
        recipe=resolved,
        allow_overlap=allow_overlap,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        progress=run.progress,
    )
    from moacompress.report.heal_tables import heal_tables

    data = {"model": str(healed.folder), **healed.notes, "losses": list(healed.losses)}
    return Output(data, heal_tables(healed.folder, healed.notes))
