"""`moacompress export`: writes a folder that plain `from_pretrained` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moacompress.cli.harness import CommandRun, Output, command
from moacompress.core.artefact_names import MODEL_FOLDER
from moacompress.models.stored_plan import find_plan_file, read_plan


@command(
    "moacompress export path/to/model plan.json -o model/",
    "moacompress export path/to/model plan.json -o model/ --overwrite --json",
    "moacompress export path/to/model plan.json -o model/ --repair profile/",
    "moacompress export path/to/model plan.json -o model/ --ranks 4",
    settings=("weights", "head_weights", "device", "dtype"),
    takes=("dry_run", "overwrite", "trust_remote_code"),
    maps=True,
)
def export(
    run: CommandRun,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder or .gguf file.")],
    plan: Annotated[
        Path, typer.Argument(metavar="PLAN", help="Plan file written by `search`, or a folder that holds one.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write the checkpoint to.")] = Path(
        MODEL_FOLDER
    ),
    repair: Annotated[
        Path | None,
        typer.Option(
            "--repair",
            metavar="PROFILE",
            help="Folder written by `profile`: refit the output projections of attention to the plan on its samples, wherever "
            "that lowers measured KL. This changes weights.",
        ),
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            help="Reorder KV heads, with their weights, so that N tensor-parallel ranks hold caches of equal size."
        ),
    ] = None,
) -> Output:
    """Write a checkpoint that from_pretrained loads.

    A fresh process loads it and generates with it before it is moved into place. --dtype sets the checkpoint's dtype; the
    default is the plan's.
    """
    from moacompress.exporter.card import repair_text
    from moacompress.exporter.exporting import ExportRequest, estimate_export, exported_plan, write_export
    from moacompress.report.inspection import inspect_plan, kv_table

    loaded = read_plan(find_plan_file(plan))
    recipe = run.recipe()
    if recipe.dtype != "auto":
        loaded = loaded.in_dtype(recipe.dtype)
    asked = ExportRequest(
        model,
        loaded,
        out,
        weights=recipe.weights,
        head_weights=recipe.head_weights,
        repair=repair,
        ranks=ranks,
        device=recipe.device,
        overwrite=run.common.overwrite,
        trust_remote_code=run.common.trust_remote_code,
    )
    if run.common.dry_run:
        expected = estimate_export(asked)
        return Output(expected.to_dict(), [expected.line()])
    folder = write_export(asked, run.progress)
    written = exported_plan(folder) or loaded
    inspected = inspect_plan(written)
    data = {"model": str(folder), "plan": str(plan), "kv_bytes": inspected["kv_bytes"], "repair": inspected["repair"]}
    text = repair_text(written)
    load = f'Load it with AutoModelForCausalLM.from_pretrained("{folder}")'
    return Output(data, [kv_table(inspected), *([text] if text else []), load])
