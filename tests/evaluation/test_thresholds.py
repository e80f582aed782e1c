"""Thresholds that fail a build."""

from __future__ import annotations

from typing import Any

import pytest

from moacompress.core.errors import BudgetError, UsageError
from moacompress.evaluation.scoring.thresholds import Threshold, failures, parse_thresholds

TASKS = ("niah-single-1", "key-value", "text")


def row(
    value: float, metric: str = "exact_match", task: str = "key-value", length: int = 1024, model: str = "plan"
) -> Any:
    return {"model": model, "task": task, "length": length, "metric": metric, "value": value}


def test_forms() -> None:
    assert parse_thresholds(None, TASKS) == []
    two = [Threshold("exact_match", 0.9), Threshold("retention", 0.92)]
    assert parse_thresholds("exact_match=0.9, retention=.92", TASKS) == two
    assert parse_thresholds("niah-single-1:exact_match=1", TASKS) == [Threshold("exact_match", 1.0, "niah-single-1")]
    (found,) = parse_thresholds("key-value@2k:accuracy=0.98", TASKS)
    assert found == Threshold("accuracy", 0.98, "key-value", 2048)
    assert str(found) == "key-value@2k:accuracy=0.98"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed=0.9", "unknown metric 'speed' in a threshold; known are exact_match, accuracy"),
        ("key-valeu:accuracy=0.9", "unknown task 'key-valeu' in a threshold; did you mean 'key-value'"),
        ("nll=0.9", "nll is better when it is lower"),
        ("exact_match", "cannot read the threshold 'exact_match'; write METRIC=SHARE"),
        ("exact_match=90", "cannot read the threshold"),
        ("exact_match=nan", "cannot read the threshold"),
        (":exact_match=0.9", "cannot read the threshold"),
        (" , ", "no threshold given"),
    ],
)
def test_malformed(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_thresholds(text, TASKS)
    with pytest.raises(BudgetError):
        Threshold.parse("key-value@2q:exact_match=0.9", TASKS)


def test_the_value_of_the_plan_counts() -> None:
    thresholds = parse_thresholds("exact_match=0.9", TASKS)
    rows = [row(0.9), row(0.89, length=2048), row(0.1, model="dense"), row(0.1, metric="accuracy")]
    assert failures(thresholds, rows) == ["key-value@2k:exact_match is 0.890, less than 0.9"]
    assert failures(parse_thresholds("key-value@1k:exact_match=0.9", TASKS), rows) == []
    assert failures([], rows) == []
