"""Retention counts the prompts that dense gets right."""

from __future__ import annotations

from typing import Any

import pytest

from moacompress.core.statistics import wilson
from moacompress.evaluation.scoring.prompts import Score
from moacompress.evaluation.scoring.result_rows import Measured, ResultRow, TaskCell, pooled_rows, result_rows
from moacompress.evaluation.scoring.stored_scores import StoredModel, measured_again, score_rows


def named(name: str) -> Any:
    return StoredModel(name, 1)


def scored(exact: list[float]) -> list[Score]:
    return [Score(value, value, 1 - value) for value in exact]


def kept_of(dense: list[float], model: list[float], documents: list[str] | None = None) -> ResultRow | None:
    """Returns the retention of a model as `result_rows` has it."""
    sides = {"plan": model, "dense": dense}
    measured = [Measured(named(name), scored(exact), documents or ()) for name, exact in sides.items()]
    rows = result_rows(TaskCell("t", 64, len(dense), 60), measured)
    return next((row for row in rows if (row["model"], row["metric"]) == ("plan", "retention")), None)


@pytest.mark.parametrize(
    ("dense", "model", "value", "prompts"),
    [
        ([1.0, 1.0, 0.5, 0.0, 1.0] * 3, [1.0, 0.0, 1.0, 1.0, 1.0] * 3, 2 / 3, 9),
        ([1.0, 1.0, 0.5], [0.5, 1.0, 0.0], 0.75, 2),
        ([0.5, 0.0], [1.0, 1.0], None, 0),
    ],
)
def test_retention_counts_what_dense_gets_fully_right(
    dense: list[float], model: list[float], value: float | None, prompts: int
) -> None:
    row = kept_of(dense, model)
    assert (row and row["value"]) == value
    if row is not None:
        interval = wilson(row["value"] * prompts, prompts)
        assert (row["prompts"], row["ci95"]) == (prompts, None if interval is None else list(interval))


def test_prompts_of_one_document_count_as_one() -> None:
    """Five questions, each at three lengths: as many units as questions, whatever the number of prompts."""
    dense, model = [1.0] * 15, [1.0, 1.0, 1.0, 1.0, 0.0] * 3
    documents = ["a", "b", "c", "d", "e"] * 3
    row = kept_of(dense, model, documents)
    assert row is not None
    assert (row["value"], row["prompts"], row["documents"]) == (0.8, 15, 5)
    assert row["ci95"] == list(wilson(4, 5) or ())
    sides = {"plan": model[:5], "dense": dense[:5]}
    fields = [[Measured(named(name), scored(exact), documents[:5]) for name, exact in sides.items()]] * 3
    results, differences = pooled_rows(fields)
    (kept,) = [row for row in results if (row["model"], row["metric"]) == ("plan", "retention")]
    assert (kept["value"], kept["prompts"], kept["documents"], kept["ci95"]) == (0.8, 15, 5, row["ci95"])
    apart = {row["metric"]: row for row in differences}
    assert apart["exact_match"]["p"] == 1.0  # one question of five; three prompts of fifteen would be p .25
    assert apart["exact_match"]["documents"] == 5
    alone = [[Measured(one.compared, one.scores) for one in field] for field in fields]
    assert {row["metric"]: row["p"] for row in pooled_rows(alone)[1]}["exact_match"] == 0.25


def test_pooled_rows_are_of_all_prompts() -> None:
    """Two tasks of other difficulty: the numbers together are those of their prompts, and of what dense gets right."""
    easy, hard = {"plan": [1.0, 0.0] * 10, "dense": [1.0] * 20}, {"plan": [1.0, 0.0] * 10, "dense": [1.0, 0.0] * 10}
    fields = [
        [Measured(named(name), [Score(value, 0.5, loss) for value in exact]) for name, exact in cell.items()]
        for cell, loss in ((easy, 0.0), (hard, 2.0))
    ]
    results, differences = pooled_rows(fields)
    rows = {(row["model"], row["metric"]): row for row in results}
    for name, share in (("plan", 20 / 40), ("dense", 30 / 40)):
        assert (rows[name, "exact_match"]["value"], rows[name, "exact_match"]["prompts"]) == (share, 40)
        assert rows[name, "nll"]["value"] == 1.0
    assert (rows["plan", "retention"]["value"], rows["plan", "retention"]["prompts"]) == (pytest.approx(20 / 30), 30)
    apart = {row["metric"]: row for row in differences}
    assert apart["exact_match"]["value"] == pytest.approx(-0.25)
    assert apart["retention"]["value"] == pytest.approx(-1 / 3)
    assert apart["retention"]["ci95"][1] < 0


def test_documents_outlive_the_prompts() -> None:
    cell = TaskCell("document-question", 512, 2, 500)
    stored = score_rows(cell, [Measured(named("plan"), scored([1.0, 0.0]), ["a", "a"])])
    ((_, (again,)),) = measured_again(stored)
    assert again.units() == ["a", "a"]
    assert result_rows(cell, [again])[0]["documents"] == 1
