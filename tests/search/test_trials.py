"""Which trial wins."""

from __future__ import annotations

import numpy as np
import pytest

from moacompress.search.measure.kl_difference import CAUTION, KlDifference
from moacompress.search.measure.trials import TrialResult, best_trial, is_hopeless, log_ratio, lowest_trial


def trial(index, kls, first, pruned=False):
    return TrialResult(index, str(index), {}, list(kls), log_ratio(kls, first), pruned, {})


def trials(*changes, samples=20, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    first = rng.uniform(0.05, 0.2, samples)
    tried = [trial(0, first, first)]
    for change in changes:
        tried.append(trial(len(tried), first * np.exp(change + noise * rng.standard_normal(samples)), first))
    return tried


@pytest.mark.seeds(40)
def test_the_best_of_many_that_differ_by_chance_does_not(seed):
    tried = trials(*[0.0] * 6, noise=0.3, seed=seed)
    least, first = lowest_trial(tried), tried[0]
    apart = np.subtract(least.kls, first.kls)
    clear = -apart.mean() > CAUTION * apart.std(ddof=1) / len(apart) ** 0.5
    assert best_trial(tried).index == (least.index if clear else 0)


def test_mean_kl_decides_and_not_its_logarithm():
    """Many samples of hardly any KL are halved, one that has nearly all of it gets worse: a user loses more."""
    first = np.array([0.001] * 11 + [1.0])
    halves = first * np.array([0.5] * 11 + [1.1])
    tried = [trial(0, first, first), trial(1, halves, first), trial(2, first * 0.9, first)]
    assert tried[1].value < tried[2].value < 0  # so says the mean log-ratio
    assert lowest_trial(tried).index == 2
    assert not KlDifference.of(halves, first).value < 0


def test_a_noisy_winner_gives_way_to_a_clear_one():
    first = np.full(10, 0.1)
    noisy = first + [-0.099, 0.059] * 5
    clear = first * 0.9
    tried = [trial(0, first, first), trial(1, noisy, first), trial(2, clear, first)]
    assert lowest_trial(tried).index == 1
    assert best_trial(tried).index == 2


def test_pruned_trials_never_win():
    first = [0.1] * 4
    tried = [trial(0, first, first), trial(1, [0.001], first, pruned=True)]
    assert best_trial(tried).index == lowest_trial(tried).index == 0


def test_a_plan_that_is_clearly_worse_is_hopeless():
    best = [0.1] * 8
    assert is_hopeless([0.9, 0.8, 0.7, 0.9, 0.8], best)
    assert not is_hopeless([0.09] * 5, best)


def test_a_single_sample_says_nothing_of_noise():
    tried = [trial(0, [0.1], [0.1]), trial(1, [0.09], [0.1])]
    assert best_trial(tried).index == 0
    assert lowest_trial(tried).index == 1
    assert KlDifference.of([0.09], [0.1]).to_dict() == {
        "value": pytest.approx(-0.01),
        "standard_error": None,
        "ci95": None,
        "samples": 1,
        "p": 1.0,
        "candidates": 1,
    }
