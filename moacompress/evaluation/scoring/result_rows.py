"""From scores to the rows of an evaluation: values with intervals, differences, and what is at floor.

Prompts that ask about one document, at one length or at several, are not independent: they count as one, with their mean,
and rows say of how many `documents` they are.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from moacompress.core.shingles import OVERLAP_LIMIT
from moacompress.core.statistics import (
    Estimate,
    Interval,
    by_document,
    mean,
    p_value,
    paired_difference,
    paired_rates,
    rate,
)
from moacompress.evaluation.baselines.compared_models import DENSE, DENSE_SIDES, PLAN, ComparedModel
from moacompress.evaluation.scoring.prompts import Score
from moacompress.evaluation.scoring.retention import retained, retention
from moacompress.evaluation.tasks.cases import Case

SCORES = ("exact_match", "accuracy", "nll")
"""Metrics that every prompt has; `differences` are of these."""
POOLED = "all tasks"
"""Task of the rows that pool prompts of several kinds."""
FLOOR = 0.2
"""A rate whose interval ends below this is at floor: the model cannot do the task, and losing nothing proves nothing."""
ResultRow = dict[str, Any]


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


@dataclass(frozen=True)
class Measured:
    """A compared model with its scores, one for each prompt of a cell.

    Attributes:
        compared: the model.
        scores: one for each prompt.
        documents: of each prompt, as `Case` has it; empty where every prompt has its own.
    """

    compared: ComparedModel
    scores: list[Score]
    documents: Sequence[str] = ()

    def units(self, cell: int = 0) -> list[Hashable]:
        """Returns what each prompt of the cell of some number asks about: the document, or itself."""
        documents = self.documents or [""] * len(self.scores)
        return [document or (cell, index) for index, document in enumerate(documents)]

    def values(self, metric: str) -> list[float]:
        """Returns one number for each prompt."""
        return [getattr(score, metric) for score in self.scores]


class _Scored(Protocol):
    """A compared model with its numbers."""

    @property
    def compared(self) -> ComparedModel: ...

    def values(self, name: str, /) -> list[float]: ...


Candidate = TypeVar("Candidate", bound=_Scored)


def best_candidates(measured: Iterable[Candidate], nll: str = "nll") -> list[Candidate]:
    """Returns one of each name: the candidate with the lowest mean NLL, the first of equals.

    Args:
        measured: all candidates on the same prompts or windows.
        nll: name of the values that decide.
    """
    best: dict[str, Candidate] = {}
    for one in measured:
        held = best.get(one.compared.name)
        if held is None or sum(one.values(nll)) < sum(held.values(nll)):
            best[one.compared.name] = one
    return list(best.values())


def result_rows(cell: TaskCell, comparison: Sequence[Measured]) -> list[ResultRow]:
    """Returns the rows of every model: `SCORES`, and `retention` where the dense model is there and gets a prompt right.

    `retention` is of the prompts that all dense sides answer fully; `prompts_dense` says how many each of them does.
    """
    sides = _dense_sides({one.compared.name: one.values("exact_match") for one in comparison})
    dense = all_answer(sides.values())
    units = comparison[0].units()
    rows = []
    for one in comparison:
        for metric in SCORES:
            value, interval = _value(metric, by_document(one.values(metric), units))
            rows.append({**result_row(cell, one.compared, metric, value, interval, cell.prompts), **_documents(units)})
        kept = retention(dense, one.values("exact_match"), units) if dense else None
        if kept is not None:
            row = result_row(cell, one.compared, "retention", *kept)
            rows.append({**row, **_documents(retained(dense, units)), **_answered(sides)})
    return rows


def all_answer(sides: Iterable[Sequence[float]]) -> list[float]:
    """Returns the least exact match of some sides on each prompt: 1 where all of them answer it fully."""
    return [min(of_prompt) for of_prompt in zip(*sides, strict=True)]


def _dense_sides(exact: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """Returns the exact match of the dense model by each attention that it was measured with."""
    return {name: exact[name] for name in DENSE_SIDES if name in exact}


def _answered(sides: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    return {"prompts_dense": {name: sum(value == 1.0 for value in exact) for name, exact in sides.items()}}


def _documents(units: Sequence[Hashable]) -> dict[str, int]:
    """Returns how many documents some prompts ask about, where that is fewer than there are prompts."""
    count = len(set(units))
    return {"documents": count} if count < len(units) else {}


def result_row(
    cell: TaskCell, compared: ComparedModel, metric: str, value: float, interval: Interval | None, prompts: int
) -> ResultRow:
    """Returns one row of `results`."""
    return {
        **_row(cell.task, cell.length, compared.name, metric, value, interval, prompts),
        "kv_bytes": compared.kv_bytes,
        "tokens": cell.tokens,
        "overlap": cell.overlap,
        **compared.description(cell.tokens),
    }


def difference_rows(cell: TaskCell, comparison: Sequence[Measured]) -> list[ResultRow]:
    """Returns the rows of the plan (first in `comparison`) minus every other model, paired by prompt."""
    ours, *others = comparison
    units = ours.units()
    return [
        {
            **difference_row(cell, ours.compared, one.compared, metric, *_difference(
                metric, by_document(ours.values(metric), units), by_document(one.values(metric), units)
            )),
            **_documents(units),
        }
        for one in others
        for metric in SCORES
    ]  # fmt: skip


def difference_row(
    cell: TaskCell,
    plan: ComparedModel,
    other: ComparedModel,
    metric: str,
    value: float,
    interval: Interval | None,
    p: float,
) -> ResultRow:
    """Returns one row of `differences`: the plan minus another model, and how likely that is of two that are alike."""
    row = _row(cell.task, cell.length, other.name, metric, value, interval, cell.prompts)
    return {
        **row,
        "p": p,
        "kv_bytes": plan.kv_bytes,
        "kv_bytes_of_model": other.kv_bytes,
        "tokens": cell.tokens,
        "overlap": cell.overlap,
    }


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

    Args:
        fields: the models of every cell, the plan first; only those that all cells have are pooled.
        overlap: of all prompts together, as `TaskCell` has it.
        task: what the rows are called, such as one of `tasks.registry.KINDS`.
    """
    names = [one.compared.name for one in fields[0]]
    names = [name for name in names if all(name in {one.compared.name for one in comparison} for comparison in fields)]
    columns = {
        name: [next(one for one in comparison if one.compared.name == name) for comparison in fields] for name in names
    }
    scores = {
        name: {metric: [value for one in column for value in one.values(metric)] for metric in SCORES}
        for name, column in columns.items()
    }
    units = [unit for cell, comparison in enumerate(fields) for unit in comparison[0].units(cell)]
    count = len(units)
    sides = _dense_sides({name: scored["exact_match"] for name, scored in scores.items()})
    dense = all_answer(sides.values())
    results, differences = [], []
    for name, column in columns.items():
        share = sum(one.compared.kv_bytes * len(one.scores) for one in column) / count
        asked: dict[str, list[Hashable]] = dict.fromkeys(SCORES, units)
        prompts: dict[str, list[float]] = dict(scores[name])
        if 1.0 in dense:
            asked["retention"] = retained(dense, units)
            prompts["retention"] = retained(dense, prompts["exact_match"])
        values = {metric: by_document(numbers, asked[metric]) for metric, numbers in prompts.items()}
        for metric, numbers in values.items():
            value, interval = _value(metric, numbers)
            row = _row(task, None, name, metric, value, interval, len(asked[metric])) | _documents(asked[metric])
            answered = _answered(sides) if metric == "retention" else {}
            results.append({**row, "kv_bytes": round(share), "overlap": overlap, **answered})
        if name == names[0]:
            ours = values
            continue
        for metric, numbers in values.items():
            value, interval, p = _difference(metric, ours[metric], numbers)
            row = _row(task, None, name, metric, value, interval, len(asked[metric])) | _documents(asked[metric])
            differences.append({**row, "p": p, "overlap": overlap})
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


def _value(metric: str, numbers: Sequence[float]) -> Estimate:
    return (mean if metric == "nll" else rate)(numbers)


def _difference(metric: str, first: Sequence[float], second: Sequence[float]) -> tuple[float, Interval | None, float]:
    compare = paired_difference if metric == "nll" else paired_rates
    return (*compare(first, second), p_value(first, second))


def _row(
    task: str, length: int | None, model: str, metric: str, value: float, interval: Interval | None, prompts: int
) -> ResultRow:
    return {
        "model": model,
        "task": task,
        "length": length,
        "metric": metric,
        "value": value,
        "ci95": None if interval is None else list(interval),
        "prompts": prompts,
    }
