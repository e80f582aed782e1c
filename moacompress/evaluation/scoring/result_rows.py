"""From scores to the rows of an evaluation: values with intervals, differences, and what is at floor.

Prompts that ask about one document, at one length or at several, are not independent, nor are windows of one text: they count
as one, with their mean, and rows say of how many `documents` they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from moacompress.core.shingles import OVERLAP_LIMIT
from moacompress.core.statistics import (
    Estimate,
    Interval,
    by_document,
    exponential_mean,
    mean,
    p_value,
    paired_difference,
    paired_rates,
    perplexity_difference,
    positive_mean,
    rate,
)
from moacompress.evaluation.baselines.compared_models import DENSE, DENSE_SIDES, PLAN, ComparedModel
from moacompress.evaluation.tasks.cases import Case
from moacompress.evaluation.tasks.task import TEXT

T = TypeVar("T")
ResultRow = dict[str, Any]
POOLED = "all tasks"
"""Task of the rows that pool prompts of several kinds."""
FLOOR = 0.2
"""A rate whose interval ends below this is at floor: the model cannot do the task, and losing nothing proves nothing."""


@dataclass(frozen=True)
class Metric:
    """What rows say of the scores of a model: a value, and a paired difference to another one, each with its interval.

    Attributes:
        name: in rows.
        number: the field of a score that it is made of.
        value: of one number per document.
        difference: of two models' numbers.
    """

    name: str
    number: str
    value: Callable[[Sequence[float]], Estimate]
    difference: Callable[[Sequence[float], Sequence[float]], Estimate]


PROMPT_METRICS = (
    Metric("exact_match", "exact_match", rate, paired_rates),
    Metric("accuracy", "accuracy", rate, paired_rates),
    Metric("nll", "nll", mean, paired_difference),
)
RETENTION = Metric("retention", "exact_match", rate, paired_rates)
"""On the prompts that dense answers in full."""
TEXT_METRICS = (
    Metric("ppl_early", "nll_early", exponential_mean, perplexity_difference),
    Metric("ppl_late", "nll_late", exponential_mean, perplexity_difference),
    Metric("kl", "kl", positive_mean, paired_difference),
    # a mean over hundreds of tokens itself, far from the zeros and ones that `rate` allows for
    Metric("top1_agreement", "top1_agreement", mean, paired_difference),
)
"""Perplexity at the positions [1, N/2) and [N/2, N) of windows of N tokens; in the latter KL(dense || model), nats a token, and
the share of tokens that both rank first."""


@dataclass(frozen=True)
class TaskCell:
    """One task at one length.

    Attributes:
        task: its name.
        length: nominal length, tokens.
        prompts: how many prompts, or windows of text.
        tokens: their mean number of tokens, where KV bytes are stated.
        overlap: share of their shingles that the plan's calibration has seen; None where that is not known.
    """

    task: str
    length: int
    prompts: int
    tokens: int
    overlap: float | None = None

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What its rows say."""
        return TEXT_METRICS if self.task == TEXT else PROMPT_METRICS


@dataclass(frozen=True)
class Measured:
    """A compared model with its scores, one for each prompt or window of a cell.

    Attributes:
        compared: the model.
        scores: a `Score` or `TextScore` for each.
        documents: of each, as `Case` has it; empty where every prompt has its own.
    """

    compared: ComparedModel
    scores: Sequence[Any]
    documents: Sequence[str] = ()

    def units(self, cell: int = 0) -> list[Hashable]:
        """Returns what each prompt of the cell of some number asks about: the document, or itself."""
        documents = self.documents or [""] * len(self.scores)
        return [document or (cell, index) for index, document in enumerate(documents)]

    def values(self, number: str) -> list[float]:
        """Returns one number for each prompt."""
        return [getattr(score, number) for score in self.scores]

    def means(self, number: str) -> list[float]:
        """Returns one number for each document."""
        return by_document(self.values(number), self.units())


def best_candidates(measured: Iterable[Measured], loss: Callable[[Measured], Sequence[float]]) -> list[Measured]:
    """Returns one of each name, in order: the candidate with the lowest mean loss, the first of equals."""
    best: dict[str, Measured] = {}
    for one in measured:
        held = best.get(one.compared.name)
        if held is None or sum(loss(one)) < sum(loss(held)):
            best[one.compared.name] = one
    return list(best.values())


def result_rows(cell: TaskCell, comparison: Sequence[Measured]) -> list[ResultRow]:
    """Returns the rows of every model: the metrics, and `retention` where a dense model is there and gets a prompt right.

    `retention` is of the prompts that all dense sides answer fully; `prompts_dense` says how many each of them does.
    """

    def row(one: Measured, metric: Metric, numbers: Sequence[float], units: Sequence[Hashable]) -> ResultRow:
        value, interval = metric.value(by_document(numbers, units))
        return {
            **_row(cell.task, cell.length, one.compared.name, metric, value, interval, len(units)),
            "kv_bytes": one.compared.kv_bytes,
            "tokens": cell.tokens,
            "overlap": cell.overlap,
            **one.compared.description(cell.tokens),
            **_documents(units, cell.task),
        }

    units, sides = comparison[0].units(), dict[str, Sequence[float]]()
    if cell.task != TEXT:
        sides = _dense_sides({one.compared.name: one.values("exact_match") for one in comparison})
    dense = all_answer(sides.values())
    rows = []
    for one in comparison:
        rows += [row(one, metric, one.values(metric.number), units) for metric in cell.metrics]
        if 1.0 in dense:
            kept = retained(dense, one.values(RETENTION.number))
            rows.append({**row(one, RETENTION, kept, retained(dense, units)), **_answered(sides)})
    return rows


def retained(dense: Sequence[float], given: Sequence[T]) -> list[T]:
    """Returns what belongs to the prompts that dense gets fully right, such as a model's exact match on them."""
    return [each for exact, each in zip(dense, given, strict=True) if exact == 1.0]


def all_answer(sides: Iterable[Sequence[float]]) -> list[float]:
    """Returns the least exact match of some sides on each prompt: 1 where all of them answer it fully."""
    return [min(of_prompt) for of_prompt in zip(*sides, strict=True)]


def _dense_sides(exact: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """Returns the exact match of the dense model by each attention that it was measured with."""
    return {name: exact[name] for name in DENSE_SIDES if name in exact}


def _answered(sides: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    return {"prompts_dense": {name: sum(value == 1.0 for value in exact) for name, exact in sides.items()}}


def _documents(units: Sequence[Hashable], task: str = "") -> dict[str, int]:
    """Returns of how many documents prompts are, where that is fewer than there are prompts, and of text always."""
    count = len(set(units))
    return {"documents": count} if count < len(units) or task == TEXT else {}


def difference_rows(cell: TaskCell, comparison: Sequence[Measured]) -> list[ResultRow]:
    """Returns the rows of the plan (first in `comparison`) minus every other model, paired by document.

    `p` says how likely a difference is of two models that are alike.
    """
    ours, *others = comparison
    rows = []
    for one in others:
        for metric in cell.metrics:
            first, second = ours.means(metric.number), one.means(metric.number)
            value, interval = metric.difference(first, second)
            rows.append(
                {
                    **_row(cell.task, cell.length, one.compared.name, metric, value, interval, cell.prompts),
                    "p": p_value(first, second),
                    "kv_bytes": ours.compared.kv_bytes,
                    "kv_bytes_of_model": one.compared.kv_bytes,
                    "tokens": cell.tokens,
                    "overlap": cell.overlap,
                    **_documents(ours.units(), cell.task),
                }
            )
    return rows


def answer_rows(cell: TaskCell, cases: Sequence[Case], comparison: Sequence[Measured]) -> list[ResultRow]:
    """Returns for every prompt what was asked, the reference, and what plan and dense said, with their exact match."""
    said = {one.compared.name: one.scores for one in comparison if one.compared.name in (PLAN, DENSE)}
    return [
        {
            "task": cell.task,
            "length": cell.length,
            "question": case.question,
            "references": list(case.references),
            **{name: scores[index].answer for name, scores in said.items()},
            **{f"{name}_match": scores[index].exact_match for name, scores in said.items()},
        }
        for index, case in enumerate(cases)
    ]


def mean_overlap(cells: Sequence[TaskCell]) -> float | None:
    """Returns the overlap of all prompts of several cells together; None where that of one is not known."""
    seen = [(cell.overlap, cell.prompts) for cell in cells]
    if any(share is None for share, _ in seen):
        return None
    return sum(share * count for share, count in seen if share is not None) / sum(count for _, count in seen)


def pooled_rows(
    fields: Sequence[Sequence[Measured]], overlap: float | None = None, task: str = POOLED
) -> tuple[list[ResultRow], list[ResultRow]]:
    """Returns the rows and the differences of all prompts of several cells together, without a length.

    Differences also have `retention`: of the prompts that dense gets right, by all attentions that it was measured with.
    The models of every cell come with the plan first; only those that all cells have are pooled. Rows are of `task`, such
    as a kind of prompts.
    """
    names = [one.compared.name for one in fields[0]]
    names = [name for name in names if all(name in {one.compared.name for one in comparison} for comparison in fields)]
    columns = {
        name: [next(one for one in comparison if one.compared.name == name) for comparison in fields] for name in names
    }

    def numbers_of(name: str, number: str) -> list[float]:
        return [value for one in columns[name] for value in one.values(number)]

    units = [unit for cell, comparison in enumerate(fields) for unit in comparison[0].units(cell)]
    sides = _dense_sides({name: numbers_of(name, "exact_match") for name in names})
    dense = all_answer(sides.values())
    results, differences = [], []
    for name, column in columns.items():
        share = sum(one.compared.kv_bytes * len(one.scores) for one in column) / len(units)
        for metric in (*PROMPT_METRICS, *([RETENTION] if 1.0 in dense else [])):
            both, asked = [numbers_of(each, metric.number) for each in (name, names[0])], units
            if metric is RETENTION:
                both, asked = [retained(dense, each) for each in both], retained(dense, units)
            theirs, ours = (by_document(each, asked) for each in both)
            answered = _answered(sides) if metric is RETENTION else {}
            row = _row(task, None, name, metric, *metric.value(theirs), len(asked)) | _documents(asked)
            results.append({**row, "kv_bytes": round(share), "overlap": overlap, **answered})
            if name != names[0]:
                row = _row(task, None, name, metric, *metric.difference(ours, theirs), len(asked)) | _documents(asked)
                differences.append({**row, "p": p_value(ours, theirs), "overlap": overlap})
    return results, differences


def at_floor(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns `{task, length}` of what the dense model itself cannot do: its interval of exact match ends below `FLOOR`."""
    return [
        {"task": row["task"], "length": row["length"]}
        for row in results
        if row["model"] == DENSE and row["metric"] == "exact_match" and row["ci95"] and row["ci95"][1] < FLOOR
    ]


def seen_in_calibration(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns `{task, length, overlap}` of what calibration has seen more of than `OVERLAP_LIMIT`."""
    found = {(row["task"], row["length"]): row["overlap"] for row in results}
    return [
        {"task": task, "length": length, "overlap": share}
        for (task, length), share in found.items()
        if share is not None and share > OVERLAP_LIMIT
    ]


def _row(
    task: str, length: int | None, model: str, metric: Metric, value: float, interval: Interval | None, prompts: int
) -> ResultRow:
    return {
        "model": model,
        "task": task,
        "length": length,
        "metric": metric.name,
        "value": value,
        "ci95": None if interval is None else list(interval),
        "prompts": prompts,
    }
