"""Intervals against known values."""

from __future__ import annotations

import numpy as np
import pytest

from moacompress.evaluation.scoring.stats import (
    bootstrap_mean,
    mean,
    paired_difference,
    paired_rates,
    perplexity_difference,
    rate,
    retention,
    wilson,
)


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
    monkeypatch.setattr("moacompress.evaluation.scoring.stats._CHUNK", 700)
    assert bootstrap_mean(values, seed=3) == whole


def test_pairing_removes_what_prompts_have_in_common() -> None:
    rng = np.random.default_rng(1)
    hardness = rng.normal(0, 10, 50)
    first, second = hardness + 1 + rng.normal(0, 0.1, 50), hardness
    value, (low, high) = paired_difference(first.tolist(), second.tolist())
    assert value == pytest.approx(1.0, abs=0.1)
    assert 0.9 < low < value < high < 1.1
    assert paired_difference([1.0, 2.0], [1.0, 2.0]) == (0.0, (0.0, 0.0))


def test_differences_that_are_the_same_on_all_prompts_are_no_certainty() -> None:
    assert paired_rates([1.0, 0.0, 1.0], [0.0, 0.0, 1.0], 3) == paired_difference([1.0, 0.0, 1.0], [0.0, 0.0, 1.0], 3)
    unseen = wilson(0, 6)[1]
    assert unseen > 0.3
    assert paired_rates([1.0] * 6, [0.0] * 6) == (1.0, (1 - 2 * unseen, 1.0))
    assert paired_rates([0.0] * 6, [1.0] * 6) == (-1.0, (-1.0, 2 * unseen - 1))
    assert paired_rates([1.0, 0.0, 1.0] * 2, [1.0, 0.0, 1.0] * 2) == (0.0, (-unseen, unseen))
    value, (low, high) = paired_rates([0.75] * 100, [0.5] * 100)
    assert value == 0.25
    assert 0.18 < low < value < high < 0.3


def test_rate_chooses_the_interval_by_the_values() -> None:
    zeros_and_ones = [1.0] * 45 + [0.0] * 5
    assert rate(zeros_and_ones) == (0.9, wilson(45, 50))
    shares = [0.25, 0.5, 1.0, 0.75] * 5
    assert rate(shares, seed=2) == (0.625, bootstrap_mean(shares, seed=2))
    value, (low, high) = rate([0.75] * 20)
    assert value == 0.75
    assert low < 0.6 < 0.85 < high  # equal shares are no certainty
    assert rate([0.0] * 20) == (0.0, wilson(0, 20))


def test_wilson_of_shares_is_no_narrower_than_their_bootstrap() -> None:
    shares = [0.25, 0.5, 1.0, 0.75] * 10
    (low, high), (inner_low, inner_high) = wilson(sum(shares), 40), bootstrap_mean(shares)
    assert low < inner_low < inner_high < high


def test_retention_counts_what_dense_gets_fully_right() -> None:
    assert retention([1.0, 1.0, 0.5, 0.0, 1.0], [1.0, 0.0, 1.0, 1.0, 1.0]) == (2 / 3, wilson(2, 3), 3)
    found = retention([1.0, 1.0, 0.5], [0.5, 1.0, 0.0])
    assert found is not None
    assert (found[0], found[2]) == (0.75, 2)
    assert retention([0.5, 0.0], [1.0, 1.0]) is None
    with pytest.raises(ValueError, match="zip"):
        retention([1.0], [1.0, 1.0])


def test_the_value_is_within_its_interval() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 10):
        for values in (rng.random(n).tolist(), [0.1] * n, [1e9 + 0.1] * n):
            for value, (low, high) in (mean(values), rate([min(v, 1.0) for v in values])):
                assert low <= value <= high


def test_perplexity_difference_is_paired() -> None:
    rng = np.random.default_rng(1)
    second = rng.normal(2.5, 0.8, 40)
    first = second + 0.02 + rng.normal(0, 0.002, 40)
    value, (low, high) = perplexity_difference(first.tolist(), second.tolist())
    assert value == pytest.approx(np.exp(first.mean()) - np.exp(second.mean()))
    assert 0 < low < value < high < 2 * value
    assert perplexity_difference([1.0, 2.0], [1.0, 2.0]) == (0.0, (0.0, 0.0))
