"""From measurements on long text to the rows of an evaluation: perplexity by position, KL and agreement with dense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moacompress.core.records import Entry
from moacompress.evaluation.baselines.compared_models import ComparedModel
from moacompress.evaluation.scoring.result_rows import ResultRow, TaskCell, difference_row, result_row
from moacompress.evaluation.scoring.stats import Interval, mean, paired_difference, perplexity_difference

TEXT = "text"
"""Name of the task. A row's `prompts` are windows of text, and intervals are over windows."""
PERPLEXITIES = {"ppl_early": "nll_early", "ppl_late": "nll_late"}
"""Perplexity at the positions [1, N/2) and [N/2, N) of windows of N tokens, and the measurement that it comes from."""
TEXT_METRICS = (*PERPLEXITIES, "kl", "top1_agreement")
"""`kl`: KL(dense || model) in nats a token, `top1_agreement`: share of tokens that both rank first; both in [N/2, N)."""


@dataclass(frozen=True)
class TextMeasured:
    """A compared model with its numbers, one entry for each window."""

    compared: ComparedModel
    entries: list[Entry]

    def values(self, name: str) -> list[float]:
        """Returns one number for each window."""
        return [entry[name] for entry in self.entries]


def text_result_rows(cell: TaskCell, comparison: Sequence[TextMeasured], seed: int) -> list[ResultRow]:
    """Returns the rows `TEXT_METRICS` of every model."""
    return [
        result_row(cell, one.compared, metric, *_value(one, metric, seed), cell.prompts)
        for one in comparison
        for metric in TEXT_METRICS
    ]


def text_difference_rows(cell: TaskCell, comparison: Sequence[TextMeasured], seed: int) -> list[ResultRow]:
    """Returns the rows of the plan (first in `comparison`) minus every other model, paired by window."""
    ours, *others = comparison
    rows = []
    for one in others:
        for metric in TEXT_METRICS:
            name = PERPLEXITIES.get(metric, metric)
            compare = perplexity_difference if metric in PERPLEXITIES else paired_difference
            value, interval = compare(ours.values(name), one.values(name), seed)
            rows.append(difference_row(cell, ours.compared, one.compared, metric, value, interval))
    return rows


def _value(measured: TextMeasured, metric: str, seed: int) -> tuple[float, Interval]:
    if metric in PERPLEXITIES:
        value, (low, high) = mean(measured.values(PERPLEXITIES[metric]), seed)
        return math.exp(value), (math.exp(low), math.exp(high))
    return mean(measured.values(metric), seed)
