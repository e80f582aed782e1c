"""Measured moves: which KV heads are tried, and which of the moves are made together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from moacompress.calibration.profile.store import Profile
from moacompress.rules.rule import Rule
from moacompress.search.problem.knapsack import Knapsack
from moacompress.search.search_request import SearchRequest
from moacompress.search.steps.moves import Move, combined, marginal_moves

Profiles = Callable[..., Profile]


def setting(profiles: Profiles) -> tuple[Knapsack, np.ndarray, np.ndarray]:
    profile = profiles()
    request = SearchRequest.of(profile, "50%", profile.recipe)
    knapsack = request.space().knapsack
    costs = request.surrogate.costs()
    return knapsack, costs, knapsack.choose(costs)


def sizes(knapsack: Knapsack, choice: np.ndarray) -> np.ndarray:
    return np.take_along_axis(knapsack.sizes, choice[None, ..., None], -1)[..., 0]


def test_moves_go_both_ways_and_are_the_least_sure(profiles: Profiles) -> None:
    knapsack, costs, choice = setting(profiles)
    moves = marginal_moves(knapsack, costs, choice, 3)
    before = sizes(knapsack, choice)[-1]
    added = [int(sizes(knapsack, move.on(choice))[-1].sum() - before.sum()) for move in moves]
    assert sum(change > 0 for change in added) == sum(change < 0 for change in added) == 3
    assert len({(move.layer, move.head) for move in moves[:3]}) == 3
    for move in moves:
        changed = move.on(choice)
        assert (changed != choice).sum() == 1
        assert changed[move.layer, move.head] == move.rule
    assert marginal_moves(knapsack, costs - 5.0, choice, 3) == moves  # only differences count
    every = marginal_moves(knapsack, costs, choice, 100)
    assert len(every) <= 2 * choice.size
    assert moves[0] in every


def test_what_pays_is_made_together_within_the_limits(profiles: Profiles) -> None:
    knapsack, costs, choice = setting(profiles)
    moves = marginal_moves(knapsack, costs, choice, 4)
    before = sizes(knapsack, choice)[-1].sum()
    worth = np.array([-1.0 if sizes(knapsack, m.on(choice))[-1].sum() > before else 0.1 for m in moves])
    ratios = np.repeat(worth[:, None], 5, axis=1)
    changed = combined(knapsack, choice, moves, ratios)
    assert (sizes(knapsack, changed).sum((1, 2)) <= knapsack.limits).all()
    made = [move for move in moves if changed[move.layer, move.head] == move.rule]
    assert any(sizes(knapsack, move.on(choice))[-1].sum() > before for move in made)
    others = np.ones_like(choice, bool)
    for move in moves:
        others[move.layer, move.head] = False
    assert np.array_equal(changed[others], choice[others])
    assert np.array_equal(combined(knapsack, choice, moves, np.abs(ratios)), choice)  # nothing pays


def test_noise_does_not_pay(profiles: Profiles) -> None:
    knapsack, costs, choice = setting(profiles)
    moves = marginal_moves(knapsack, costs, choice, 4)
    down = [m for m in moves if sizes(knapsack, m.on(choice))[-1].sum() < sizes(knapsack, choice)[-1].sum()]
    noisy = np.array([[-1.0, 0.9, -0.9, 0.8]] * len(down))  # mean -0.05, error 0.5
    assert np.array_equal(combined(knapsack, choice, down, noisy), choice)
    sure = np.full((len(down), 4), -0.05)
    assert not np.array_equal(combined(knapsack, choice, down, sure), choice)
    assert np.array_equal(combined(knapsack, choice, [Move(0, 0, int(choice[0, 0]))], np.zeros((1, 1))), choice)


def test_what_is_left_is_spent_on_wider_rules(profiles: Profiles) -> None:
    knapsack, costs, _ = setting(profiles)
    rng = np.random.default_rng(0)
    narrow = np.argsort(knapsack.sizes.sum(axis=(0, 1, 2)))[:12]
    for _ in range(20):
        choice = rng.choice(narrow, costs.shape[:2])
        filled = knapsack.filled(costs, choice)
        before, after = sizes(knapsack, choice), sizes(knapsack, filled)
        assert (after >= before).all()
        assert (after > before).any()
        assert (after.sum(axis=(1, 2)) <= knapsack.limits).all()
        assert (
            np.take_along_axis(costs, filled[..., None], -1) <= np.take_along_axis(costs, choice[..., None], -1)
        ).all()
        assert np.array_equal(knapsack.filled(costs, filled), filled)


def test_what_one_length_leaves_over_is_spent_there(profiles: Profiles) -> None:
    """Where the shorter length binds, windows that grow with n take what is left at the longer one."""
    knapsack, costs, _ = setting(profiles)
    choice = np.full(costs.shape[:2], profiles().rules.index(Rule(4, 64, 0)))
    used = sizes(knapsack, choice).sum(axis=(1, 2))
    tight = replace(knapsack, limits=np.array([used[0], 10 * used[1]]))
    after = sizes(tight, tight.filled(np.zeros_like(costs), choice)).sum(axis=(1, 2))
    assert after[0] == used[0]
    assert after[1] > 1.5 * used[1]
    rising = np.zeros_like(costs)
    rising[..., choice[0, 0]] = -1  # every other rule is predicted to cost more
    assert np.array_equal(tight.filled(rising, choice), choice)
