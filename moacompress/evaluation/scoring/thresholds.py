"""Thresholds such as `exact_match=0.9` or `needle-noise@1k:retention=0.92`, for checks that fail a build.

A threshold is held against the plan's values, not against the ends of their intervals: prompts and seeds are fixed, so
the same model gives the same value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moacompress.core.errors import UsageError, did_you_mean
from moacompress.evaluation.baselines.compared_models import PLAN
from moacompress.rules.budget import format_length, parse_length

RISING = ("exact_match", "accuracy", "retention", "top1_agreement")
"""Metrics between 0 and 1 of which more is better."""
FALLING = ("nll", "kl", "ppl_early", "ppl_late")
_FORM = "write METRIC=SHARE, TASK:METRIC=SHARE or TASK@LENGTH:METRIC=SHARE, such as needle-noise:exact_match=0.98"


@dataclass(frozen=True)
class Threshold:
    """The least value of a metric, of one task and length or of all."""

    metric: str
    least: float
    task: str | None = None
    length: int | None = None

    @staticmethod
    def parse(text: str, tasks: Sequence[str]) -> Threshold:
        """Reads one threshold of an evaluation of some tasks.

        Raises:
            UsageError: malformed; an unknown metric or task, with the nearest known one; a metric of which less is
                better.
        """
        left, equals, number = text.partition("=")
        where, colon, metric = left.rpartition(":")
        task, at, length = where.partition("@")
        try:
            least = float(number)
        except ValueError:
            least = -1.0
        if not equals or not 0 <= least <= 1 or (colon and not task) or (at and not length):
            raise UsageError(f"cannot read the threshold {text!r}; {_FORM}")
        if metric in FALLING:
            raise UsageError(f"{metric} is better when it is lower; set a threshold for one of {', '.join(RISING)}")
        named = [("metric", metric, RISING), *([("task", task, tasks)] if colon else [])]
        for what, name, known in named:
            if name not in known:
                hint = did_you_mean(name, known, f"known are {', '.join(known)}")
                raise UsageError(f"unknown {what} {name!r} in a threshold; {hint}")
        return Threshold(metric, least, task or None, parse_length(length) if at else None)

    def concerns(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of `results` is one that this threshold is for."""
        return (
            (row["model"], row["metric"]) == (PLAN, self.metric)
            and self.task in (None, row["task"])
            and self.length in (None, row["length"])
        )

    def __str__(self) -> str:
        length = "" if self.length is None else f"@{format_length(self.length)}"
        return f"{f'{self.task}{length}:' if self.task else ''}{self.metric}={self.least:g}"


def parse_thresholds(text: str | None, tasks: Sequence[str]) -> list[Threshold]:
    """Returns the thresholds of a list with commas.

    Raises:
        UsageError: one cannot be read, or the list is empty.
    """
    if text is None:
        return []
    found = [Threshold.parse(item.strip(), tasks) for item in text.split(",") if item.strip()]
    if not found:
        raise UsageError(f"no threshold given; {_FORM}")
    return found


def failures(thresholds: Iterable[Threshold], results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns one text for every row below its threshold, and for every threshold that no row is there for."""
    found = []
    for threshold in thresholds:
        rows = [row for row in results if threshold.concerns(row)]
        if not rows:
            found.append(f"{threshold} (nothing measured)")
        for row in rows:
            if row["value"] < threshold.least:
                where = f"{row['task']}@{format_length(row['length'])}:{row['metric']}"
                found.append(f"{where} is {row['value']:.3f}, less than {threshold.least:g}")
    return found
