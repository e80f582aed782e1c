"""`moacompress data`: the data that a profile is made of."""

from __future__ import annotations

from typing import Annotated

import typer

from moacompress.cli.harness import CommandRun, Output, command, group
from moacompress.cli.options import (
    LengthsOption,
    ModelArgument,
    RecipeFile,
    Sources,
    Text,
    TrustRemoteCode,
    required_model,
)


@command(
    "moacompress data preview path/to/model",
    "moacompress data preview path/to/model --source recall --source squad.json --lengths 1k,4k",
    "moacompress data preview path/to/model --recipe recipe.yaml --count 6 --json",
    maps=True,
)
def preview(
    run: CommandRun,
    model: ModelArgument = None,
    recipe: RecipeFile = None,
    source: Sources = None,
    text: Text = None,
    lengths: LengthsOption = None,
    count: Annotated[int, typer.Option(min=1, help="Samples shown, of as many sources and lengths as there are.")] = 3,
    trust_remote_code: TrustRemoteCode = False,
) -> Output:
    """Show some calibration samples, with the tokens that count marked.

    They are among those that `moacompress profile` would make of the same options, the answers of MODEL included.
    """
    resolved = run.recipe(recipe)
    name = required_model(model, resolved.model)

    from moacompress.calibration.data.answers import answer_drafts
    from moacompress.calibration.data.sample_sources import make_drafts, varied
    from moacompress.report.shown_samples import ShownSample, as_json
    from moacompress.runtime.ready_model import load_for

    loaded = load_for(resolved, name, trust_remote_code=trust_remote_code)
    drafts = varied(make_drafts(loaded, resolved, "calibration"), count)
    samples = answer_drafts(loaded.model, drafts, run.progress)
    return Output(
        {"model": loaded.source, "samples": [as_json(sample, loaded.tokenizer) for sample in samples]},
        [ShownSample(sample, loaded.tokenizer, f"{i}/{len(samples)}") for i, sample in enumerate(samples, 1)],
    )


app = group("Look at the data that a profile is made of.", {"preview": preview})
