"""`moacompress report`: writes one page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moacompress.cli.harness import CommandRun, Output, command
from moacompress.core.artefact_names import REPORT_FILE
from moacompress.models.stored_plan import find_running_plan


@command(
    "moacompress report runs/mine",
    "moacompress report runs/mine -o mine.html --json",
    "moacompress report plan.json --profile profile/ -o plan.html",
    "moacompress report runs/mine --card",
)
def report(
    run: CommandRun,
    path: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder of a run, a compressed model, or a plan file.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="File to write the page to [default: report.html in the run's folder]."
        ),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Profile of the dense model. Default: the run's own.")
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write the figures as PNG; needs kaleido and Chrome."),
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Also add the figures to the checkpoint and its model card.")
    ] = False,
) -> Output:
    """Show gains and losses on one page.

    Writes a single HTML file: a map of what every KV head keeps, quality beside the baselines, memory and speed against length,
    predicted against measured KL, and how the plan was found. For each missing measurement it names the command to run.
    """
    from moacompress.report.page.findings import Findings
    from moacompress.report.page.report_page import illustrate_card, write_page, write_pictures

    found = Findings.load(find_running_plan(path), profile)
    page = out or found.folder / REPORT_FILE
    data = write_page(found, page)
    drawn = [
        *(write_pictures(found, pictures) if pictures is not None else []),
        *(illustrate_card(found) if card else []),
    ]
    if drawn:
        data["pictures"] = [str(file) for file in drawn]
    return Output(
        data,
        [
            f"The page is {page}",
            *found.warnings,
            *(f"{row['what']} This fills it: {row['command']}" for row in data["missing"]),
            *(f"Left out: {text}." for text in found.passed_over),
            *(f"The picture is {file}" for file in data.get("pictures", ())),
        ],
    )
