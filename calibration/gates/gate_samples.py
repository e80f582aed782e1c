"""Samples that gates are trained on. Nothing in them is profiled: a rule that selects is priced where its gate was not trained.

Of files and hub sets they are rows whose prompt no profiled sample has. Texts of calibration are in two parts, dealt by hash
(`prompts.pools`): about a fourth of plain text, of prose haystacks and of the articles of questions is for gates. Generators
draw with another seed.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from moacompress.calibration.data.sample_sources import make_drafts
from moacompress.core.errors import DataError

if TYPE_CHECKING:
    from moacompress.calibration.data.answers import SampleDraft
    from moacompress.models.source import SourceModel
    from moacompress.recipe import Recipe

logger = logging.getLogger(__name__)

GATE_SEED = 1_000_003
"""What is added to the seed."""
FEWEST = 2
"""Samples without which nothing is trained: one to be fitted to, and one to be judged on."""


def gate_recipe(recipe: Recipe) -> Recipe:
    """Returns the recipe whose calibration samples gates are trained on: of the shortest length, and no other samples.

    Plain text has the share of them that it has of the profiled ones, but one sample at least has an answer.
    """
    asked, count = recipe.calibration, recipe.profile.gate_samples
    texts = min(round(count * asked.text_samples / (asked.samples + asked.text_samples)), count - 1)
    own = asked.model_copy(update={"lengths": asked.lengths[:1], "samples": count - texts, "text_samples": texts})
    return recipe.model_copy(update={"calibration": own, "seed": recipe.seed + GATE_SEED})


def gate_drafts(source: SourceModel, recipe: Recipe) -> list[SampleDraft]:
    """Returns the samples that gates are trained on before the dense model has answered; the model does not run.

    Where the rows of a file or hub set are too few there are fewer than `profile.gate_samples`, and a warning says so.

    Raises:
        DataError: what is profiled leaves too little for gates.
    """
    profiled, wanted = make_drafts(source, recipe, "calibration"), recipe.profile.gate_samples
    try:
        found = make_drafts(source, gate_recipe(recipe), "calibration", beside=profiled)
    except DataError as error:
        raise DataError(
            f"of what is left for gates beside what is profiled: {error}; or leave out the gates"
        ) from error
    lack = (
        f"{len(found)} of the {wanted} samples that gates are trained on can be had: their rows are not those of the "
        f"{len(profiled)} profiled samples, and have prompts for {min(recipe.calibration.lengths):,} tokens"
    )
    if len(found) < FEWEST:
        raise DataError(f"{lack}; give more rows, ask for fewer samples (calibration.samples), or leave out the gates")
    if len(found) < wanted:
        logger.warning("%s; with more rows, or fewer profiled samples, gates would be better", lack)
    return found
