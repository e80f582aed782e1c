"""Rounds: how far one goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from moacompress.calibration.store import Profile
from moacompress.search.knapsack import Knapsack, choice_of, chosen_plan
from moacompress.search.quadratic import Quadratic
from moacompress.search.search_request import SearchRequest
from moacompress.search.steps.rounds import NEUTRAL, RANGES, STARTS, moved

Profiles = Callable[..., Profile]
Search = Callable[..., tuple[Any, Any]]


def test_a_round_moves_no_more_than_its_share(profiles: Profiles) -> None:
    profile = profiles()
    request = SearchRequest.of(profile, "50%", profile.recipe)
    knapsack = Knapsack.of(request)
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
        reached.append(form.harm(end) - form.harm(choice))
    assert 0 >= reached[0] > reached[1] > reached[2]
    worse = Quadratic(np.zeros((1, *linear.shape)), np.abs(linear))
    assert np.array_equal(moved(knapsack, worse, STARTS[0], choice), choice)  # nothing helps
    assert moved(knapsack, form, NEUTRAL, choice) is choice
    nothing = Quadratic(np.zeros((1, *linear.shape)), np.zeros(linear.shape))
    assert np.array_equal(moved(knapsack, nothing, STARTS[0], choice), choice)
    assert np.array_equal(choice_of(profile, chosen_plan(profile, choice)), choice)


def test_what_a_round_starts_with_is_in_reach() -> None:
    for knobs in (NEUTRAL, *STARTS):
        assert set(knobs) == set(RANGES)
        assert all(low <= knobs[name] <= high for name, (low, high) in RANGES.items())
