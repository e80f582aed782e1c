"""The audit of single formats: which are measured, and what is said of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from moacompress.calibration.profile.statistics import Statistics
from moacompress.calibration.profile.store import Profile
from moacompress.rules.rule import Rule
from moacompress.search.audit.audit import predicted_influence
from moacompress.search.audit.precision import assess_formats, choose_format_picks, format_plans
from tests.search.conftest import make_profile


@pytest.fixture
def offered() -> Profile:
    return make_profile(layers=5, kv_heads=3, formats=True).offering(("int8", "int4"))


def test_picks_are_spread_over_layers_heads_and_kinds(offered: Profile) -> None:
    picks = choose_format_picks(offered, 30, 0)
    assert len(set(picks)) == 30
    assert set(Counter(pick.layer for pick in picks).values()) == {6}
    assert max(Counter(pick.kind for pick in picks).values()) == 8
    assert set(Counter((pick.layer, pick.kv_head) for pick in picks).values()) == {2}
    assert picks == choose_format_picks(offered, 30, 0)
    assert picks != choose_format_picks(offered, 30, 1)
    every = choose_format_picks(offered, 1000, 0)
    assert len(set(every)) == len(every) == 5 * 3 * 4
    assert {pick.kind for pick in every} == {"int8 keys", "int8 values", "int4 keys", "int4 values"}
    for pick, plan in zip(picks, format_plans(offered, picks), strict=True):
        changed = [
            (layer, head, rule)
            for layer, row in enumerate(plan.rules)
            for head, rule in enumerate(row)
            if not rule.is_full
        ]
        assert changed == [(pick.layer, pick.kv_head, pick.rule)]
        assert pick.rule.sees_all
        assert {pick.rule.key_format, pick.rule.value_format} == {"native", pick.format}


def test_what_is_said_of_predictions_that_are_a_third_too_small(offered: Profile) -> None:
    influence = predicted_influence(offered, offered.validation)
    picks = choose_format_picks(offered, 40, 0)
    truth = np.array([influence["robust"][pick.among(offered)] for pick in picks])
    found = assess_formats(offered, influence, picks, 1.5 * truth, 0)
    row = found["audit_precision"]
    assert (row["estimator"], row["spearman"], row["n"]) == ("robust", 1.0, 40)
    assert row["ratio"] == pytest.approx(1.5)
    assert row["ratio_range"] == pytest.approx([1.5, 1.5])
    assert sum(kind["n"] for kind in row["kinds"].values()) == 40
    assert row["kinds"]["int4 keys"]["spearman"] == 1.0
    assert [point["measured"] for point in found["precision_points"]] == pytest.approx(1.5 * truth)
    noise = np.exp(np.random.default_rng(0).normal(0, 30, 40))
    assert abs(assess_formats(offered, influence, picks, truth * noise, 0)["audit_precision"]["spearman"]) < 0.6


def test_what_says_nothing_of_formats_predicts_the_span(offered: Profile) -> None:
    arrays = offered.statistics.arrays
    judged = predicted_influence(offered, offered.validation)
    assert set(judged) == {"robust"}
    both = {**arrays, "mass": arrays["squares"]}
    found = predicted_influence(replace(offered, statistics=Statistics(both)), offered.validation)
    spans = len(offered.spans)
    assert found["mass"].shape == found["robust"].shape == (5, 3, len(offered.rules))
    for first in range(0, len(offered.rules), spans):
        np.testing.assert_array_equal(found["mass"][..., first : first + spans], found["mass"][..., :spans])
    rule = offered.rules.index(Rule(4, 0, 1024, "int4", "int4"))
    assert (found["robust"][..., rule] > 0).all()
    assert not found["mass"][..., rule].any()
