"""`moacompress data`: the data that a profile is made from."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from moacompress.cli.harness import CommandRun, Output, command, group
from moacompress.cli.options import ModelArgument, required_model
from moacompress.core.errors import DataError

if TYPE_CHECKING:
    from moacompress.calibration.data.sample_sources import RowsWanted


@command(
    "moacompress data preview path/to/model",
    "moacompress data preview path/to/model --source recall --source squad.json --lengths 1k,4k",
    "moacompress data preview path/to/model --recipe recipe.yaml --count 6 --json",
    settings=(
        "calibration.sources",
        "calibration.text",
        "calibration.lengths",
        "calibration.samples",
        "calibration.validation_samples",
        "seed",
        "device",
        "dtype",
    ),
    takes=("recipe", "settings", "trust_remote_code"),
    maps=True,
)
def preview(
    run: CommandRun,
    model: ModelArgument = None,
    count: Annotated[int, typer.Option(min=1, help="Number of samples to show, spread over sources and lengths.")] = 3,
) -> Output:
    """Show some calibration samples, with their target tokens marked.

    These are some of the samples that `moacompress profile` would make with the same options, including MODEL's answers. Of a
    file with too few rows for a profile those that there are are shown, and how many a profile takes; what else `profile`
    would refuse is refused here.
    """
    resolved = run.recipe(model=model)
    name = required_model(resolved)

    from moacompress.calibration.data.answers import answer_drafts
    from moacompress.calibration.data.sample_sources import check_data, make_drafts, rows_wanted, varied
    from moacompress.calibration.profile.request import check_samples
    from moacompress.report.shown_samples import ShownSample, as_json
    from moacompress.runtime.ready_model import load_for

    check_data(resolved)
    loaded = load_for(resolved, name, trust_remote_code=run.common.trust_remote_code)
    rows, refused = rows_wanted(resolved), None
    try:
        check_samples(loaded, resolved)
    except DataError as error:
        if not rows:
            raise
        refused = error
    drafts = make_drafts(loaded, resolved, "calibration", may_lack=refused is not None)
    if refused is not None and not drafts:
        raise refused
    answered = answer_drafts(loaded.model, varied(drafts, count), run.progress)
    return Output(
        {
            "model": loaded.source,
            "samples": [as_json(sample, loaded.tokenizer) for sample in answered],
            "rows": [asdict(each) for each in rows],
            "refused": None if refused is None else str(refused),
        },
        [
            *(ShownSample(sample, loaded.tokenizer, f"{i}/{len(answered)}") for i, sample in enumerate(answered, 1)),
            *map(_rows_text, rows),
            *([] if refused is None else [f"A profile with these settings is refused: {refused}"]),
        ],
    )


def _rows_text(each: RowsWanted) -> str:
    return (
        f"{each.source} has {each.rows:,} rows; a profile with these settings needs about {each.needed:,}: it makes "
        f"{each.wanted['calibration']} calibration samples of half of them, {each.wanted['validation']} validation samples of "
        "a quarter, and a quarter is held out."
    )


app = group("Look at the data that a profile is made from.", {"preview": preview})
