"""`moacompress eval`: a compressed model on synthetic tasks, beside the dense model and a uniform window."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moacompress.cli.harness import Output, Run, verb
from moacompress.cli.locate import find_model_folder
from moacompress.cli.options import Lengths, Text, split_list


@verb(
    "moacompress eval runs/mine --tasks needle-noise --lengths 1k --prompts 50",
    "moacompress eval runs/mine/model --tasks needle-noise,needle-prose --text prose/ -o eval.json",
    "moacompress eval runs/mine --against dense --json",
)
def evaluate(
    run: Run,
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Compressed model, or folder of a run.")],
    against: Annotated[
        str, typer.Option(metavar="LIST", help="What to measure beside it: dense, uniform, or none.")
    ] = "dense,uniform",
    tasks: Annotated[str | None, typer.Option(metavar="LIST", help="Tasks, such as needle-noise,key-value.")] = None,
    lengths: Lengths = None,
    prompts: Annotated[int | None, typer.Option(help="Prompts of each task and length.")] = None,
    text: Text = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the results here too.")] = None,
) -> Output:
    """Measure a compressed model beside the dense one.

    Exact match and NLL of the answer, on prompts that it was not calibrated on.
    """
    folder = find_model_folder(path)
    recipe = run.recipe(
        evaluation__tasks=split_list(tasks),
        evaluation__lengths=lengths,
        evaluation__prompts=prompts,
        calibration__text=text,
    )

    from moacompress.evaluation import evaluate as evaluate_model
    from moacompress.report.summary import results_table

    scores = evaluate_model(
        folder,
        against=tuple(name for name in split_list(against) or () if name != "none"),
        tasks=recipe.evaluation.tasks,
        lengths=recipe.evaluation.lengths,
        prompts=recipe.evaluation.prompts,
        text=recipe.calibration.text,
        seed=recipe.seed,
        device=recipe.device,
        out=out,
        progress=run.progress,
    )
    return Output(scores, [results_table(scores["results"])])
