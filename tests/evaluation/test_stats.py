"""Intervals against known values."""

from __future__ import annotations

import numpy as np
import pytest

from moacompress.evaluation.stats import bootstrap_mean, paired_difference, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
    [(0, 20, 0.0, 0.161130), (20, 20, 0.838870, 1.0), (10, 20, 0.299298, 0.700702), (45, 50, 0.786398, 0.956524)],
)
def test_wilson(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-5)


def test_wilson_agrees_with_scipy() -> None:
    from scipy.stats import binomtest

    for n in (1, 7, 30):
        for successes in range(n + 1):
            wanted = binomtest(successes, n).proportion_ci(method="wilson")
            assert wilson(successes, n) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_bootstrap_of_equal_values_is_a_point() -> None:
    assert bootstrap_mean([2.5] * 9) == (2.5, 2.5)
    assert bootstrap_mean([1.0]) == (1.0, 1.0)


def test_bootstrap_is_close_to_normal_theory() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = bootstrap_mean(values.tolist())
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_bootstrap_is_seeded_and_chunks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [0.0, 1.0, 5.0, 2.0]
    whole = bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) == whole
    monkeypatch.setattr("moacompress.evaluation.stats._CHUNK", 700)
    assert bootstrap_mean(values, seed=3) == whole


def test_pairing_removes_what_prompts_have_in_common() -> None:
    rng = np.random.default_rng(1)
    hardness = rng.normal(0, 10, 50)
    first, second = hardness + 1 + rng.normal(0, 0.1, 50), hardness
    value, (low, high) = paired_difference(first.tolist(), second.tolist())
    assert value == pytest.approx(1.0, abs=0.1)
    assert 0.9 < low < value < high < 1.1
    assert paired_difference([1.0, 2.0], [1.0, 2.0]) == (0.0, (0.0, 0.0))
