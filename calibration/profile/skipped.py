"""Samples that are left out of a profile because a number in them is not finite, and how many may be."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from moacompress.calibration.data.samples import Sample
from moacompress.core.errors import DataError

MAX_SKIPPED = 0.05
"""Share of the samples that may be left out."""


def check_skipped(skipped: Collection[int], samples: Mapping[int, Sample], total: int) -> None:
    """Refuses a profile that too many samples are left out of.

    Args:
        skipped: their numbers.
        samples: the samples that are here, by number.
        total: samples of the profile. Where not all are here, those of a length may all be elsewhere.

    Raises:
        DataError: says how many.
    """
    left = {sample.length for index, sample in samples.items() if index not in skipped}
    lost = sorted({sample.length for sample in samples.values()} - left) if len(samples) == total else []
    if len(skipped) > MAX_SKIPPED * total or lost:
        where = f", and none of length {lost[0]:,} is left" if lost else ""
        raise DataError(
            f"{len(skipped)} of {total} samples have activations or gradients that are not finite (at most "
            f"{MAX_SKIPPED:.0%} may){where}; profile with --dtype float32, and check that the model is sound"
        )
