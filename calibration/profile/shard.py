"""A shard: a part of a profile's samples, made by a run of its own that needs nothing of the others.

Samples that the dense model answers in one batch stay together, so that answers are those of a run that makes them all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

from moacompress.calibration.data.answers import SampleDraft, answer_batches
from moacompress.core.errors import UsageError


@dataclass(frozen=True)
class Shard:
    """What a run makes of a profile; validated where it is read from a manifest.

    Attributes:
        number: of the shard, from 1 on.
        count: of the shards.
        totals: calibration and validation samples of the whole profile.
        calibration: numbers of its calibration samples among those of the profile, ascending.
        validation: numbers of its validation samples, ascending.
    """

    number: int
    count: int
    totals: tuple[int, int]
    calibration: tuple[int, ...]
    validation: tuple[int, ...]

    @field_validator("calibration", "validation")
    @classmethod
    def _of_the_profile(cls, numbers: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        total = info.data["totals"][info.field_name == "validation"] if "totals" in info.data else 0
        if list(numbers) != sorted(set(numbers)) or not all(0 <= number < total for number in numbers):
            raise ValueError("a shard has samples that its profile does not have")
        return numbers

    @property
    def name(self) -> str:
        """What a person calls it: "3/8"."""
        return f"{self.number}/{self.count}"

    @staticmethod
    def of(number: int, count: int, calibration: Sequence[SampleDraft], validation: Sequence[SampleDraft]) -> Shard:
        """Returns a shard of the samples of a profile.

        Raises:
            UsageError: it has none to profile.
        """
        parts = [parted(drafts, count)[number - 1] for drafts in (calibration, validation)]
        if not parts[0]:
            batches = len(_units(calibration))
            raise UsageError(
                f"shard {number}/{count} has no samples: the {len(calibration)} samples are answered in {batches} batches; "
                f"make {batches} shards or fewer"
            )
        return Shard(number, count, (len(calibration), len(validation)), parts[0], parts[1])


def parse_shard(text: str) -> tuple[int, int]:
    """Returns number and count of "3/8".

    Raises:
        UsageError: it is something else.
    """
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text.strip())
    number, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= count:
        raise UsageError(f"--shard {text!r} is none; the third of eight shards is 3/8, and the first is 1/8")
    return number, count


def parted(drafts: Sequence[SampleDraft], count: int) -> list[tuple[int, ...]]:
    """Returns the numbers of the drafts that each of so many shards has: about as many tokens in each."""
    tokens, parts = [0] * count, [list[int]() for _ in range(count)]
    units = [(sum(len(drafts[index].ids) + drafts[index].room for index in unit), unit) for unit in _units(drafts)]
    for size, unit in sorted(units, key=lambda each: (-each[0], each[1])):
        least = tokens.index(min(tokens))
        tokens[least] += size
        parts[least] += unit
    return [tuple(sorted(part)) for part in parts]


def _units(drafts: Sequence[SampleDraft]) -> list[list[int]]:
    """Returns the numbers of drafts that stay together: batches that are answered, and each other draft alone."""
    units = []
    for batch in answer_batches(drafts):
        units += [batch] if drafts[batch[0]].room else [[index] for index in batch]
    return units
