"""`moacompress compress`: profiles, searches, exports and evaluates in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moacompress.cli.harness import CommandRun, Output, command
from moacompress.cli.options import (
    Budgets,
    ClassesOption,
    FormatsOption,
    GatesOption,
    HeadWeightsOption,
    LengthsOption,
    MaxLossOption,
    MemoryOption,
    ModelArgument,
    Overwrite,
    RecipeFile,
    Samples,
    ScorerOption,
    Sources,
    Text,
    TextSamples,
    TrustRemoteCode,
    ValidationSamples,
    WeightsOption,
    dry_run_option,
    required_model,
    split_list,
    with_memory,
)
from moacompress.cli.recipe_options import recipe_option
from moacompress.efforts import Effort, effort_recipe
from moacompress.rules.loss import one_limit


@command(
    "moacompress compress path/to/model --budget 25% -o runs/mine",
    "moacompress compress path/to/model --recipe recipes/smollm2-135m/quarter.yaml --text prose/ -o runs/mine",
    "moacompress compress path/to/model --budget 25% -o runs/mine --lengths 1k,2k --trials 24 --json",
    "moacompress compress path/to/model --max-loss 1% -o runs/mine",
    "moacompress compress path/to/model --weights int8 --memory 6GiB@8k -o runs/mine",
    "moacompress compress path/to/model --budget 25% --effort quick --dry-run",
    computes=True,
    maps=True,
)
def compress(
    run: CommandRun,
    model: ModelArgument = None,
    budget: Budgets = None,
    max_loss: MaxLossOption = None,
    memory: MemoryOption = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Folder to write the run to.")] = Path("out"),
    recipe: RecipeFile = None,
    lengths: LengthsOption = None,
    samples: Samples = None,
    text_samples: TextSamples = None,
    validation_samples: ValidationSamples = None,
    source: Sources = None,
    text: Text = None,
    weights: WeightsOption = None,
    head_weights: HeadWeightsOption = None,
    formats: FormatsOption = None,
    gates: GatesOption = None,
    scorer: ScorerOption = None,
    classes: ClassesOption = None,
    trials: Annotated[int | None, recipe_option("search.trials", states_default=False)] = None,
    tasks: Annotated[
        str | None, recipe_option("evaluation.tasks", metavar="LIST", read=split_list, states_default=False)
    ] = None,
    prompts: Annotated[int | None, recipe_option("evaluation.prompts", states_default=False)] = None,
    effort: Annotated[
        Effort | None,
        typer.Option(
            "--effort",
            help="How much to measure without a recipe: quick, standard or thorough, designed to take at most 10, 45 and 150 "
            "minutes for SmolLM2-135M on two CPU cores; --dry-run estimates it for your model. Options override it. "
            "[default: standard]",
        ),
    ] = None,
    dry_run: Annotated[bool, dry_run_option("Estimate time and memory of all steps; do nothing.")] = False,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Output:
    """Profile, search, export and evaluate in one run.

    Writes profile/, plan.json, model/, eval.json, summary.json and report.html to OUT. The same command resumes a stopped run.
    """
    resolved = run.recipe(
        recipe,
        base=None if recipe else effort_recipe(effort or "standard", prose=text is not None),
        **one_limit(with_memory(budget, memory), max_loss),
        evaluation__lengths=lengths if recipe is None else None,
    )
    resolved = resolved.override(model=required_model(model, resolved.model))

    if dry_run:
        from moacompress.pipeline import estimate

        expected = estimate(resolved, run.progress, out=out, overwrite=overwrite, trust_remote_code=trust_remote_code)
        return Output(expected.to_dict(), [f"It would take {expected.line()} Nothing was done."])

    from moacompress.pipeline import compress as compress_model
    from moacompress.report.summary_tables import closing_lines, summary_tables

    summary = compress_model(
        resolved, out, overwrite=overwrite, trust_remote_code=trust_remote_code, progress=run.progress
    )
    return Output(
        summary,
        [
            *summary_tables(summary),
            *closing_lines(out),
        ],
    )
