"""Rounds: how far one goes, how much it measures, and that only what helps is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moacompress.calibration.profile.store import Profile
from moacompress.search.problem.knapsack import choice_of, chosen_plan
from moacompress.search.problem.quadratic import Quadratic
from moacompress.search.search_request import SearchRequest
from moacompress.search.steps.rounds import NEUTRAL, STARTS, moved

Profiles = Callable[..., Profile]
Search = Callable[..., tuple[Any, Any]]


def test_a_round_moves_no_more_than_its_share(profiles: Profiles) -> None:
    profile = profiles()
    request = SearchRequest.of(profile, "50%", profile.recipe)
    knapsack = request.space().knapsack
    costs = request.surrogate.costs()
    choice = knapsack.choose(costs)
    rng = np.random.default_rng(0)
    linear = rng.normal(size=(choice.size, len(profile.rules)))
    linear -= linear[np.arange(choice.size), choice.reshape(-1)][:, None]
    form = Quadratic(rng.normal(size=(3, *linear.shape)) * 0.01, linear)
    before = np.take_along_axis(knapsack.sizes, choice[None, ..., None], -1)[..., 0]
    reached = []
    for share in (0.02, 0.1, 1.0):
        end = moved(knapsack, form, {"moved": share, "coherence": 0.9}, choice)
        after = np.take_along_axis(knapsack.sizes, end[None, ..., None], -1)[..., 0]
        assert (after.sum((1, 2)) <= knapsack.limits).all()
        assert np.abs(after - before)[-1].sum() <= 2 * share * knapsack.limits[-1]
        reached.append(form.kl(end) - form.kl(choice))
    assert 0 >= reached[0] > reached[1] > reached[2]
    worse = Quadratic(np.zeros((1, *linear.shape)), np.abs(linear))
    assert np.array_equal(moved(knapsack, worse, STARTS[0], choice), choice)  # nothing helps
    assert moved(knapsack, form, NEUTRAL, choice) is choice
    nothing = Quadratic(np.zeros((1, *linear.shape)), np.zeros(linear.shape))
    assert np.array_equal(moved(knapsack, nothing, STARTS[0], choice), choice)
    assert np.array_equal(choice_of(profile, chosen_plan(profile, choice)), choice)


def test_a_round_measures_so_many_plans_and_its_own_never(search: Search, profiles: Profiles) -> None:
    first, fake = search(profiles(layers=24, trials=1, alternatives=False))
    asked = {}
    for count in (1, 8):
        result, fake = search(profiles(layers=24, trials=1, alternatives=False, rounds=1, round_trials=count))
        calls = [key for key, _ in fake.calls]
        assert calls.count(first.plan.key()) <= fake.size  # as trial 0 of the study, not again in the round
        names = [stage["name"] for stage in result.explanation["stages"]]
        assert sum(name.startswith("round") for name in names) == 1
        asked[count] = len(set(calls))
    assert asked[1] < asked[8] <= asked[1] + 7


def test_rounds_that_do_not_help_are_not_taken(
    search: Search, profiles: Profiles, fake_objective: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = fake_objective.around

    def wrong(self: Any, *arguments: Any) -> Any:
        form = honest(self, *arguments)(0.0)
        return lambda relative: replace(form, linear=-form.linear)

    monkeypatch.setattr(fake_objective, "around", wrong)
    one_shot = search(profiles(trials=1))[0]
    misled = search(profiles(trials=1, rounds=3))[0]
    assert misled.plan.rules == one_shot.plan.rules
    assert not any(stage["kept"] for stage in misled.explanation["stages"] if stage["name"].startswith("round"))
