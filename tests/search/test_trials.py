"""Which trial wins."""

from __future__ import annotations

import numpy as np
import pytest

from moacompress.search.measure.trials import CAUTION, Tried, best_trial, least_trial, log_ratio, standard_error


def trial(index, kls, first, pruned=False):
    return Tried(index, str(index), {}, list(kls), log_ratio(kls, first), pruned, True, {})


def trials(*changes, samples=20, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    first = rng.uniform(0.05, 0.2, samples)
    tried = [trial(0, first, first)]
    for change in changes:
        tried.append(trial(len(tried), first * np.exp(change + noise * rng.standard_normal(samples)), first))
    return tried


def test_a_clear_winner_wins():
    assert best_trial(trials(0.1, -0.2, -0.1, noise=0.05)).index == 2


@pytest.mark.seeds(40)
def test_the_best_of_many_that_differ_by_chance_does_not(seed):
    tried = trials(*[0.0] * 6, noise=0.3, seed=seed)
    least = least_trial(tried)
    clear = -least.value > CAUTION * standard_error(np.log(np.divide(least.kls, tried[0].kls)).tolist())
    assert best_trial(tried).index == (least.index if clear else 0)


def test_chance_seldom_wins():
    winners = [best_trial(trials(*[0.0] * 6, noise=0.3, seed=seed)).index for seed in range(200)]
    assert sum(winner > 0 for winner in winners) < 50  # the least of the seven would be another than the first in 170


def test_a_noisy_winner_gives_way_to_a_clear_one():
    first = np.full(10, 0.1)
    noisy = first * np.exp([-3.0, 1.0] * 5)
    clear = first * 0.9
    tried = [trial(0, first, first), trial(1, noisy, first), trial(2, clear, first)]
    assert least_trial(tried).index == 1
    assert best_trial(tried).index == 2


def test_pruned_trials_never_win():
    first = [0.1] * 4
    tried = [trial(0, first, first), trial(1, [0.001], first, pruned=True)]
    assert best_trial(tried).index == least_trial(tried).index == 0


def test_one_sample_decides_alone():
    tried = [trial(0, [0.1], [0.1]), trial(1, [0.09], [0.1])]
    assert best_trial(tried).index == 1
