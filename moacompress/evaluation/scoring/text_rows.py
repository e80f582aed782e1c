"""From measurements on long text to the rows of an evaluation: perplexity by position, KL and agreement with dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moacompress.core.records import Entry
from moacompress.core.statistics import (
    Estimate,
    by_document,
    exponential_mean,
    mean,
    p_value,
    paired_difference,
    perplexity_difference,
    positive_mean,
)
from moacompress.evaluation.baselines.compared_models import ComparedModel
from moacompress.evaluation.scoring.result_rows import ResultRow, TaskCell, difference_row, result_row

TEXT = "text"
"""Name of the task. A row's `prompts` are windows of text; windows of one document count as one, with their mean."""
PERPLEXITIES = {"ppl_early": "nll_early", "ppl_late": "nll_late"}
"""Perplexity at the positions [1, N/2) and [N/2, N) of windows of N tokens, and the measurement that it comes from."""
TEXT_METRICS = (*PERPLEXITIES, "kl", "top1_agreement")
"""`kl`: KL(dense || model) in nats a token, `top1_agreement`: share of tokens that both rank first; both in [N/2, N)."""


@dataclass(frozen=True)
class TextMeasured:
    """A compared model with its numbers.

    Attributes:
        compared: the model.
        entries: its numbers, one for each window.
        documents: what document each window is of.
    """

    compared: ComparedModel
    entries: list[Entry]
    documents: list[int]

    def values(self, name: str) -> list[float]:
        """Returns one number for each document."""
        return by_document([entry[name] for entry in self.entries], self.documents)


def text_result_rows(cell: TaskCell, comparison: Sequence[TextMeasured]) -> list[ResultRow]:
    """Returns the rows `TEXT_METRICS` of every model."""
    return [
        {**result_row(cell, one.compared, metric, *_value(one, metric), cell.prompts), **_documents(one)}
        for one in comparison
        for metric in TEXT_METRICS
    ]


def text_difference_rows(cell: TaskCell, comparison: Sequence[TextMeasured]) -> list[ResultRow]:
    """Returns the rows of the plan (first in `comparison`) minus every other model, paired by document."""
    ours, *others = comparison
    rows = []
    for one in others:
        for metric in TEXT_METRICS:
            name = PERPLEXITIES.get(metric, metric)
            compare = perplexity_difference if metric in PERPLEXITIES else paired_difference
            first, second = ours.values(name), one.values(name)
            row = difference_row(
                cell, ours.compared, one.compared, metric, *compare(first, second), p_value(first, second)
            )
            rows.append({**row, **_documents(one)})
    return rows


def _documents(measured: TextMeasured) -> dict[str, int]:
    return {"documents": len(set(measured.documents))}


def _value(measured: TextMeasured, metric: str) -> Estimate:
    if metric in PERPLEXITIES:
        return exponential_mean(measured.values(PERPLEXITIES[metric]))
    # agreement is a mean over hundreds of tokens itself, far from the zeros and ones that `rate` allows for
    return (positive_mean if metric == "kl" else mean)(measured.values(metric))
