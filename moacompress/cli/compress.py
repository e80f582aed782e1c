"""`moacompress compress`: profiles, searches, exports and evaluates in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moacompress.cli.harness import CommandRun, Output, command
from moacompress.cli.options import ModelArgument, required_model
from moacompress.efforts import Effort, effort_recipe


@command(
    "moacompress compress path/to/model --budget 25% -o runs/mine",
    "moacompress compress path/to/model --recipe recipes/smollm2-135m/quarter.yaml --text prose/ -o runs/mine",
    "moacompress compress path/to/model --budget 25% -o runs/mine --lengths 1k,2k --trials 24 --json",
    "moacompress compress path/to/model --max-loss 1% -o runs/mine",
    "moacompress compress path/to/model --weights int8 --budget memory=6GiB@8k -o runs/mine",
    "moacompress compress path/to/model --budget 25% --effort quick --dry-run",
    settings=(
        "budget",
        "max_loss",
        "calibration.lengths",
        "calibration.samples",
        "calibration.validation_samples",
        "calibration.sources",
        "calibration.text",
        "weights",
        "head_weights",
        "profile.gates",
        "search.formats",
        "search.trials",
        "evaluation.tasks",
        "evaluation.prompts",
        "seed",
        "device",
        "dtype",
    ),
    takes=("recipe", "settings", "dry_run", "overwrite", "trust_remote_code"),
    states_defaults=False,
    computes=True,
    maps=True,
)
def compress(
    run: CommandRun,
    model: ModelArgument = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Folder to write the run to.")] = Path("out"),
    effort: Annotated[
        Effort | None,
        typer.Option(
            "--effort",
            help="How much to measure without a recipe: quick, standard or thorough; --dry-run "
            "estimates the minutes for your model. Options override it. "
            "[default: standard]",
        ),
    ] = None,
) -> Output:
    """Profile, search, export and evaluate in one run.

    Writes profile/, plan.json, model/, eval.json, summary.json and report.html to OUT. The same command resumes a stopped run.
    """
    given, file = run.given, run.common.recipe
    resolved = run.recipe(
        None if file else effort_recipe(effort or "standard", prose=given.get("calibration__text") is not None),
        model=model,
        evaluation__lengths=None if file else given.get("evaluation__lengths", given.get("calibration__lengths")),
    )
    required_model(resolved)
    if run.common.dry_run:
        from moacompress.pipeline import estimate

        expected = estimate(resolved, out=out, **run.how)
        return Output(expected.to_dict(), [f"It would take {expected.line()} Nothing was done."])

    from moacompress.pipeline import compress as compress_model
    from moacompress.report.summary_tables import closing_lines, summary_tables

    summary = compress_model(resolved, out, **run.how)
    return Output(summary, [*summary_tables(summary), *closing_lines(out)])
