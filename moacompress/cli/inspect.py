"""`moacompress inspect`: what a plan keeps and what it costs, without loading the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moacompress.cli.harness import Output, VerbRun, verb
from moacompress.cli.locate import find_plan_file
from moacompress.cli.options import LengthsOption


@verb(
    "moacompress inspect plan.json",
    "moacompress inspect runs/mine --lengths 1k,4k,32k",
    "moacompress inspect runs/mine/model --json",
)
def inspect(
    run: VerbRun,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Compressed model, folder of a run, or plan file.")],
    lengths: LengthsOption = None,
) -> Output:
    """Show what a plan keeps and what it costs.

    KV bytes at several lengths, and the kept share and the bits of every layer and KV head. The model is not loaded.
    """
    from moacompress.models.source import find_model_folder
    from moacompress.report.inspection import (
        formats_map,
        formats_table,
        inspect_plan,
        kept_map,
        kv_table,
        overview,
    )
    from moacompress.rules.budget import parse_lengths
    from moacompress.rules.plan import Plan

    file = find_plan_file(path)
    plan = Plan.load(file)
    data = inspect_plan(plan, parse_lengths(lengths) if lengths else None, find_model_folder(file.parent))
    shown = Output(data, [overview(plan, data), kv_table(data), kept_map(plan, data["reference_length"])])
    bits = formats_map(plan)
    if bits is not None:
        shown.show.extend((formats_table(data["formats"], data["bits"]), bits))
    return shown
