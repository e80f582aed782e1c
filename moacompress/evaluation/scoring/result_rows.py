"""From scores to the rows of an evaluation: values with intervals, differences, and what is at floor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from moacompress.evaluation.baselines.compared_models import DENSE, DENSE_SIDES, ComparedModel
from moacompress.evaluation.scoring.prompts import Score
from moacompress.evaluation.scoring.stats import (
    FLOOR,
    Interval,
    mean,
    paired_difference,
    paired_rates,
    rate,
    retained,
    retention,
)

SCORES = ("exact_match", "accuracy", "nll")
"""Metrics that every prompt has; `differences` are of these."""
POOLED = "all tasks"
"""Task of the rows that pool all prompts."""
ResultRow = dict[str, Any]


@dataclass(frozen=True)
class TaskCell:
    """One task at one length.

    Attributes:
        task: its name.
        length: nominal length, tokens.
        prompts: how many prompts, or windows of text.
        tokens: their mean number of tokens, where KV bytes are stated.
    """

    task: str
    length: int
    prompts: int
    tokens: int


@dataclass(frozen=True)
class Measured:
    """A compared model with its scores, one for each prompt of a cell."""

    compared: ComparedModel
    scores: list[Score]

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


def result_rows(cell: TaskCell, comparison: Sequence[Measured], seed: int) -> list[ResultRow]:
    """Returns the rows of every model: `SCORES`, and `retention` where the dense model is there and gets a prompt right.

    `retention` is of the prompts that all dense sides answer fully; `prompts_dense` says how many each of them does.
    """
    sides = _dense_sides({one.compared.name: one.values("exact_match") for one in comparison})
    dense = all_answer(sides.values())
    rows = []
    for one in comparison:
        for metric in SCORES:
            value, interval = _value(metric, one.values(metric), seed)
            rows.append(result_row(cell, one.compared, metric, value, interval, cell.prompts))
        kept = retention(dense, one.values("exact_match"), seed) if dense else None
        if kept is not None:
            rows.append({**result_row(cell, one.compared, "retention", *kept), **_answered(sides)})
    return rows


def all_answer(sides: Iterable[Sequence[float]]) -> list[float]:
    """Returns the least exact match of some sides on each prompt: 1 where all of them answer it fully."""
    return [min(of_prompt) for of_prompt in zip(*sides, strict=True)]


def _dense_sides(exact: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """Returns the exact match of the dense model by each attention that it was measured with."""
    return {name: exact[name] for name in DENSE_SIDES if name in exact}


def _answered(sides: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    return {"prompts_dense": {name: sum(value == 1.0 for value in exact) for name, exact in sides.items()}}


def result_row(
    cell: TaskCell, compared: ComparedModel, metric: str, value: float, interval: Interval, prompts: int
) -> ResultRow:
    """Returns one row of `results`."""
    return {
        **_row(cell.task, cell.length, compared.name, metric, value, interval, prompts),
        "kv_bytes": compared.kv_bytes,
        "tokens": cell.tokens,
        **compared.description(cell.tokens),
    }


def difference_rows(cell: TaskCell, comparison: Sequence[Measured], seed: int) -> list[ResultRow]:
    """Returns the rows of the plan (first in `comparison`) minus every other model, paired by prompt."""
    ours, *others = comparison
    return [
        difference_row(cell, ours.compared, one.compared, metric, *_difference(
            metric, ours.values(metric), one.values(metric), seed
        ))
        for one in others
        for metric in SCORES
    ]  # fmt: skip


def difference_row(
    cell: TaskCell, plan: ComparedModel, other: ComparedModel, metric: str, value: float, interval: Interval
) -> ResultRow:
    """Returns one row of `differences`: the plan minus another model."""
    row = _row(cell.task, cell.length, other.name, metric, value, interval, cell.prompts)
    return {**row, "kv_bytes": plan.kv_bytes, "kv_bytes_of_model": other.kv_bytes, "tokens": cell.tokens}


def pooled_rows(fields: Sequence[Sequence[Measured]], seed: int) -> tuple[list[ResultRow], list[ResultRow]]:
    """Returns the rows and the differences of all prompts of all cells together, under the task `POOLED` without a length.

    Differences also have `retention`: of the prompts that dense gets right, by all attentions that it was measured with.

    Args:
        fields: the models of every cell, the plan first; only those that all cells have are pooled.
        seed: of the intervals.
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
    count = sum(len(comparison[0].scores) for comparison in fields)
    sides = _dense_sides({name: scored["exact_match"] for name, scored in scores.items()})
    dense = all_answer(sides.values())
    results, differences = [], []
    for name, column in columns.items():
        share = sum(one.compared.kv_bytes * len(one.scores) for one in column) / count
        values: dict[str, list[float]] = dict(scores[name])
        if 1.0 in dense:
            values["retention"] = retained(dense, values["exact_match"])
        for metric, numbers in values.items():
            value, interval = _value(metric, numbers, seed)
            row = _row(POOLED, None, name, metric, value, interval, len(numbers))
            answered = _answered(sides) if metric == "retention" else {}
            results.append({**row, "kv_bytes": round(share), **answered})
        if name == names[0]:
            ours = values
            continue
        for metric, numbers in values.items():
            value, interval = _difference(metric, ours[metric], numbers, seed)
            differences.append(_row(POOLED, None, name, metric, value, interval, len(numbers)))
    return results, differences


def at_floor(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns `{task, length}` of what the dense model itself cannot do: its interval of exact match ends below `FLOOR`."""
    return [
        {"task": row["task"], "length": row["length"]}
        for row in results
        if row["model"] == DENSE and row["metric"] == "exact_match" and row["ci95"][1] < FLOOR
    ]


def _value(metric: str, numbers: Sequence[float], seed: int) -> tuple[float, Interval]:
    return (mean if metric == "nll" else rate)(numbers, seed)


def _difference(metric: str, first: Sequence[float], second: Sequence[float], seed: int) -> tuple[float, Interval]:
    return (paired_difference if metric == "nll" else paired_rates)(first, second, seed)


def _row(
    task: str, length: int | None, model: str, metric: str, value: float, interval: Interval, prompts: int
) -> ResultRow:
    return {
        "model": model,
        "task": task,
        "length": length,
        "metric": metric,
        "value": value,
        "ci95": list(interval),
        "prompts": prompts,
    }
