"""What calibration prompts say, as a digest, and what becomes of a profile that was begun in another wording.

The samples of a profile are stored before anything is profiled, so one whose samples are all there is finished with them,
whatever prompts say by now. Where some are missing, they would say something else than the others: that is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from moacompress.calibration.data.data_rows import read_rows, row_kind, source_name
from moacompress.calibration.profile.folder import begun_profile
from moacompress.calibration.profile.manifest import Manifest
from moacompress.calibration.profile.store import read_samples
from moacompress.core.artefact_names import CALIBRATION_FILE, VALIDATION_FILE
from moacompress.core.errors import ArtefactError
from moacompress.prompts import field_records, generators, pools, recall, sentences
from moacompress.recipe import Recipe

logger = logging.getLogger(__name__)


def calibration_wording() -> str:
    """Returns a digest of all that generators and questions about documents say, words to draw from included."""
    return sentences.wording_of(
        *(sentences.NEEDLES, sentences.DOCUMENTS),
        *(generators.PAIRS, generators.PAIRS_PREFIX),
        *(field_records.TEMPLATE, field_records.LAYOUTS, tuple(field_records.FIELDS.values())),
        *(pools.ADJECTIVES, pools.NOUNS, pools.CODE_FORMS, tuple(recall.WORDS.values())),
    )


def check_wording(out: Path, asked: Manifest, lacks_gates: Callable[[Manifest], bool]) -> None:
    """Refuses to resume a profile whose missing samples would have another wording than those that are there.

    `lacks_gates` says whether a profile that was begun has still to train its gates. Nothing in `out` is touched.

    Raises:
        ArtefactError: they would.
    """
    found = begun_profile(out)
    if found is None or (found.request, found.wording == asked.wording) != (asked.request, False):
        return
    stored = (
        read_samples(out / CALIBRATION_FILE, found.calibration_fingerprint) is not None
        and read_samples(out / VALIDATION_FILE, found.validation_fingerprint) is not None
        and not lacks_gates(found)
    )
    if not _says_something(asked.recipe):
        return
    if not stored:
        raise ArtefactError(
            f"{out} holds a profile that is not finished and whose prompts are worded in another way than this moacompress "
            "does it, so samples that it lacks would not be like its others; finish it with the version that began it, choose "
            "another folder or pass --overwrite"
        )
    logger.warning(
        "the prompts of %s are worded in another way than this moacompress does it; its samples are kept", out
    )


def _says_something(recipe: Recipe) -> bool:
    """Whether prompts of a recipe say anything but what its files do."""
    return any(
        part.generator is not None or row_kind(read_rows(part), source_name(part)) == "question"
        for part in recipe.calibration.sources
    )
