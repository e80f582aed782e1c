"""`moacompress export`: writes a folder that plain `from_pretrained` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moacompress.cli.harness import CommandRun, Output, command
from moacompress.cli.options import HeadWeightsOption, Overwrite, TrustRemoteCode, WeightsOption
from moacompress.core.artefact_names import MODEL_FOLDER
from moacompress.models.locate import find_plan_file


@command(
    "moacompress export path/to/model plan.json -o model/",
    "moacompress export path/to/model plan.json -o model/ --overwrite --json",
    "moacompress export path/to/model plan.json -o model/ --repair profile/",
    "moacompress export path/to/model plan.json -o model/ --ranks 4",
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
    weights: WeightsOption = None,
    head_weights: HeadWeightsOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check model and plan and say what would be written; write nothing.")
    ] = False,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Output:
    """Write a checkpoint that from_pretrained loads.

    A fresh process loads it and generates with it before it is moved into place. --dtype sets the checkpoint's dtype; the
    default is the plan's.
    """
    from moacompress.exporter.card import repair_text
    from moacompress.exporter.exporting import export as export_model
    from moacompress.exporter.exporting import exported_plan
    from moacompress.models.stored_plan import read_plan
    from moacompress.report.inspection import inspect_plan, kv_table

    loaded = read_plan(find_plan_file(plan))
    chosen = run.recipe()
    if run.common.dtype not in (None, "auto"):
        loaded = loaded.in_dtype(run.recipe().dtype)
    if dry_run:
        from moacompress.exporter.exporting import estimate_export

        expected = estimate_export(
            model,
            loaded,
            out,
            repair=repair,
            device=chosen.device,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            weights=chosen.weights,
            head_weights=chosen.head_weights,
        )
        return Output(expected.to_dict(), [expected.line()])
    folder = export_model(
        model,
        loaded,
        out,
        repair=repair,
        ranks=ranks,
        device=chosen.device,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        progress=run.progress,
        weights=chosen.weights,
        head_weights=chosen.head_weights,
    )
    written = exported_plan(folder) or loaded
    inspected = inspect_plan(written)
    data = {"model": str(folder), "plan": str(plan), "kv_bytes": inspected["kv_bytes"], "repair": inspected["repair"]}
    return Output(
        data,
        [
            kv_table(inspected),
            *filter(None, [repair_text(written)]),
            f'Load it with AutoModelForCausalLM.from_pretrained("{folder}")',
        ],
    )
