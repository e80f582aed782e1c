"""Whether a baseline's plan is saved in place of the searched one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.search.measure.plan_evaluator import MeasuredPlan
from moacompress.search.result.beside_baselines import BesideBaseline
from moacompress.search.search_context import Incumbent

SHAPE = ModelShape("llama", 2, 2, 2, 16, "float32", (None, None), "weights")
KLS = np.array([0.02, 0.03, 0.01, 0.05, 0.02, 0.04])
NOISE = np.array([0.03, -0.02, 0.0, 0.03, -0.01, 0.0])


def plan(alpha: int) -> Plan:
    return Plan.uniform(SHAPE, Rule(4, alpha, 0))


def beside(theirs: Sequence[float], alpha: int = 128, most: int | None = None) -> BesideBaseline:
    found = Incumbent(plan(128), KLS.tolist(), "trial 1")
    other = MeasuredPlan(plan(alpha), list(theirs))
    worst = MeasuredPlan(plan(64), [1.0] * len(KLS))
    made = BesideBaseline.of(found, {"uniform": worst, "duo": other}, 512, most)
    assert made is not None
    assert made.family == "duo"
    return made


@pytest.mark.parametrize(
    ("theirs", "alpha", "verdict", "saved"),
    [
        (KLS - 0.01, 128, "worse", True),
        (KLS + 0.01, 128, "better", False),
        (KLS + 0.01, 64, "better", False),
        (KLS - NOISE, 128, "alike", False),  # lower within noise, at the same bytes
        (KLS - NOISE, 64, "alike", True),  # lower within noise, and smaller
        (KLS + NOISE, 64, "alike", False),  # higher within noise
    ],
)
def test_a_baseline_is_saved_if_it_is_better_or_no_worse_and_smaller(
    theirs: Sequence[float], alpha: int, verdict: str, saved: bool
) -> None:
    made = beside(theirs, alpha)
    notes = made.to_dict()
    assert (notes["verdict"], notes["saved"], made.saved) == (verdict, saved, saved)
    assert notes["difference"]["value"] == pytest.approx(np.mean(KLS) - np.mean(theirs))
    low, high = notes["difference"]["ci95"]
    assert low < notes["difference"]["value"] < high


def test_the_lowest_of_many_is_better_only_where_chance_would_not_choose_it() -> None:
    """By .03 alone; where it was chosen among plans that differ from the baseline as much, in all directions, it is not."""
    rng = np.random.default_rng(0)
    others = [KLS.tolist()] + [(KLS + 0.01 + rng.permutation([0.01, -0.01] * 3)).tolist() for _ in range(29)]
    found, baseline = Incumbent(plan(128), KLS.tolist(), "trial 1"), MeasuredPlan(plan(128), (KLS + 0.01).tolist())
    verdicts = []
    for among in ([], [KLS.tolist()], others, [[0.0] * 3]):
        made = BesideBaseline.of(found, {"duo": baseline}, 512, None, among)
        assert made is not None
        verdicts.append((made.difference.verdict, made.difference.candidates))
    assert verdicts[:2] == [("better", 1), ("better", 1)]
    assert verdicts[2][1] > 10
    assert verdicts[3] == ("better", 1)  # a pruned trial has fewer samples
    assert made is not None
    assert made.difference.p == 2 / 2**6


def test_one_of_too_many_classes_is_not_saved() -> None:
    assert beside((KLS - 0.01).tolist(), most=1).saved  # it has one class
    assert not beside((KLS - 0.01).tolist(), most=0).saved


def test_no_baseline_nothing_to_compare() -> None:
    assert BesideBaseline.of(Incumbent(plan(128), [0.1], "trial 0"), {}, 512, None) is None
