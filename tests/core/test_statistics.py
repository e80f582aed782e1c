"""Intervals against known values and against simulated truth; tests against exact ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from moacompress.core.statistics import (
    SMALLEST,
    Estimate,
    Interval,
    Resampled,
    by_document,
    estimate_row,
    exponential_mean,
    mean,
    median,
    p_value,
    p_value_of_chosen,
    paired_difference,
    paired_rates,
    perplexity_difference,
    positive_mean,
    rate,
    reported_mean,
    standard_error,
    tango,
    upper_bound,
    verdict,
    wilson,
)
from moacompress.core.tables import rounded_text

SIZES = (6, 20)
DRAWS = 1000


def known(interval: Interval | None) -> Interval:
    assert interval is not None
    return interval


def coverage(draw: Callable[[int], Estimate], truth: float, draws: int = DRAWS) -> float:
    ends = np.array([known(draw(number)[1]) for number in range(draws)])
    return float(((ends[:, 0] <= truth + 1e-12) & (truth - 1e-12 <= ends[:, 1])).mean())


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(
    "pairs",  # probabilities: both right, only the first, only the second, both wrong
    [(0.25, 0.25, 0.25, 0.25), (0.8, 0.12, 0.03, 0.05), (0.6, 0.4, 0, 0)],
)
def test_intervals_of_paired_yes_and_no_cover(n: int, pairs: tuple[float, ...]) -> None:
    counts = np.random.default_rng(n).multinomial(n, pairs, DRAWS)
    found = {row: tango(row[1], row[2], n) for row in {tuple(row) for row in counts.tolist()}}
    assert coverage(lambda i: (0.0, found[tuple(counts[i].tolist())]), pairs[1] - pairs[2]) >= 0.93


@pytest.mark.parametrize("n", SIZES)
def test_intervals_of_means_and_paired_differences_cover(n: int) -> None:
    first, second = np.random.default_rng(n).normal(3.0, 2.0, (2, DRAWS, n))
    second = second * 0.2 + first - 0.5 - 0.6
    assert coverage(lambda i: mean(first[i].tolist()), 3.0) >= 0.93
    assert coverage(lambda i: paired_difference(first[i].tolist(), second[i].tolist()), 0.5) >= 0.93


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_intervals_and_bounds_of_lognormal_means_cover(n: int, sigma: float) -> None:
    values = np.exp(sigma * np.random.default_rng(n).standard_normal((2 * DRAWS, n)))
    truth = math.exp(sigma * sigma / 2)
    assert coverage(lambda i: positive_mean(values[i].tolist()), truth, len(values)) >= 0.93
    few = [upper_bound(row.tolist()) for row in values[:400]]
    assert np.mean([bound is not None and bound >= truth for bound in few]) >= 0.93


@pytest.mark.parametrize("n", SIZES)
def test_intervals_of_positive_numbers_that_are_not_lognormal_stay_near(n: int) -> None:
    rng = np.random.default_rng(n)
    two_kinds = np.where(rng.random((DRAWS, n)) < 0.5, 0.001, 2.0) * np.exp(0.3 * rng.standard_normal((DRAWS, n)))
    assert coverage(lambda i: positive_mean(two_kinds[i].tolist()), 1.0005 * math.exp(0.045)) >= 0.93
    assert max(known(positive_mean(row.tolist())[1])[1] for row in two_kinds) < 100  # Cox's alone is above 10^7


@pytest.mark.parametrize("n", SIZES)
def test_intervals_of_shares_cover_whatever_their_spread(n: int) -> None:
    rng = np.random.default_rng(n)
    draws: dict[str, tuple[np.ndarray, float]] = {
        "mostly 1": (np.where(rng.random((DRAWS, n)) < 0.9, 1.0, rng.random((DRAWS, n))), 0.95),
        "quarters": (rng.binomial(4, 0.9, (DRAWS, n)) / 4, 0.9),
        "even": (rng.random((DRAWS, n)), 0.5),
    }
    for shares, truth in draws.values():
        assert coverage(lambda i, shares=shares: rate(shares[i].tolist()), truth) >= 0.93  # type: ignore[misc]
    first, second = draws["mostly 1"][0], draws["quarters"][0]
    assert coverage(lambda i: paired_rates(first[i].tolist(), second[i].tolist()), 0.05) >= 0.93


@pytest.mark.parametrize("n", SIZES)
def test_intervals_of_perplexity_differences_cover(n: int) -> None:
    rng = np.random.default_rng(n)
    second = rng.normal(2.5, 0.3, (DRAWS, n))
    first = second + rng.normal(0.02, 0.05, (DRAWS, n))
    truth = math.exp(2.52) - math.exp(2.5)
    assert coverage(lambda i: perplexity_difference(first[i].tolist(), second[i].tolist()), truth) >= 0.92


@pytest.mark.parametrize(("n", "draws"), [(6, 400), (12, 400), (40, 100)])  # all sign flips, and random ones
def test_verdicts_of_nothing_are_rare(n: int, draws: int) -> None:
    rng = np.random.default_rng(n)
    yes_and_no = (rng.random((2, draws, n)) < 0.6).astype(float)
    shares = rng.binomial(4, 0.8, (2, draws, n)) / 4
    kls = np.exp(rng.standard_normal((2, draws, n)))
    for first, second in (yes_and_no, shares, kls):
        told = [verdict(one.tolist(), other.tolist()) for one, other in zip(first, second, strict=True)]
        assert np.mean(np.abs(told)) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / draws)


def test_verdicts_on_the_lowest_of_many_that_are_alike_are_rare() -> None:
    """By `p_value`, which takes no notice of the choice, more than a tenth of them are below .05."""
    n, naive, found = 8, 0, 0
    rng = np.random.default_rng(n)
    for _ in range(200):
        reference = rng.lognormal(size=n)
        candidates = (reference * np.exp(rng.normal(0, 0.2, (20, n)))).tolist()
        lowest = min(candidates, key=sum)
        others = [one for one in candidates if one is not lowest]
        naive += p_value(lowest, reference.tolist()) < 0.05
        found += p_value_of_chosen(lowest, others, reference.tolist()) < 0.05
    assert naive > 20
    assert found <= 16  # above 16 of 200 at .05 comes up in 2% of runs


def test_the_p_value_of_a_choice_among_one_is_that_of_the_pair() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 9)).tolist()
    assert p_value_of_chosen(first, [], second) == pytest.approx(p_value(first, second))
    assert p_value_of_chosen(first, [first], second) == pytest.approx(p_value(first, second))
    assert p_value_of_chosen(first, [second], first) == 1.0
    lower = (np.array(second) - 1 - 0.1 * rng.random(9)).tolist()
    assert p_value_of_chosen(lower, [first], second) == 2 / 2**9  # what is clear stays clear


def test_nothing_is_tested_of_numbers_that_are_not_finite() -> None:
    """Comparisons with NaN are false, so that no flip would come to as much and the p-value would be 0."""
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            p_value([bad] * 6, [0.0] * 6)


def test_what_differs_is_told() -> None:
    assert verdict([1.0] * 6, [0.0] * 6) == 1
    assert verdict([0.0] * 6, [1.0] * 6) == -1
    assert verdict([1.0] * 5, [0.0] * 5) == 0  # exact: 2 / 2^5 = .0625
    assert p_value([1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]) == pytest.approx(0.25)


def test_p_values_are_exact_for_few_and_scipys_for_many() -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    for n in (1, 5, 9):
        apart = rng.normal(0.5, 1.0, n)
        means = [abs(np.dot(signs, apart)) for signs in itertools.product((-1, 1), repeat=n)]
        exact = np.mean([one >= abs(apart.sum()) - 1e-9 for one in means])
        assert p_value([*apart, 0.0], [0.0] * (n + 1)) == pytest.approx(exact)
    apart = rng.normal(0.3, 1.0, 40)
    wanted = stats.permutation_test((apart,), np.mean, permutation_type="samples", vectorized=True, rng=rng).pvalue
    assert p_value(apart.tolist(), [0.0] * 40) == pytest.approx(wanted, abs=0.01)
    assert p_value([1.0, 2.0], [1.0, 2.0]) == 1.0
    assert p_value([0.1 + 0.2, 0.3] * 4, [0.3, 0.1 + 0.2] * 4) == 1.0
    with pytest.raises(ValueError, match="paired"):
        p_value([1.0], [1.0, 2.0])


def test_wilson_agrees_with_scipy() -> None:
    from scipy.stats import binomtest

    for n in (5, 7, 30):
        for successes in range(n + 1):
            wanted = binomtest(successes, n).proportion_ci(method="wilson")
            assert wilson(successes, n) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


@pytest.mark.parametrize(("more", "fewer", "n"), [(9, 5, 44), (4, 0, 9), (1, 7, 20), (30, 12, 200)])
def test_the_score_at_the_ends_of_tangos_interval_is_the_normal_quantile(more: int, fewer: int, n: int) -> None:
    from scipy.optimize import minimize_scalar

    def score(apart: float) -> float:
        def loss(second: float) -> float:
            both = 1 - 2 * second - apart
            first = second + apart
            return -(more * math.log(first) + fewer * math.log(second) + (n - more - fewer) * math.log(both))

        ends = max(0.0, -apart) + 1e-13, (1 - apart) / 2 - 1e-13
        likeliest = minimize_scalar(loss, bounds=ends, method="bounded", options={"xatol": 1e-12}).x
        return (more - fewer - n * apart) / math.sqrt(n * (2 * likeliest + apart - apart**2))

    low, high = known(tango(more, fewer, n))
    assert (score(low), score(high)) == pytest.approx((1.959964, -1.959964), abs=1e-4)
    assert (-high, -low) == pytest.approx(known(tango(fewer, more, n)))


def test_pairs_that_all_say_the_same_leave_what_wilson_leaves_of_none() -> None:
    unseen = known(wilson(0, 44))[1]
    assert tango(0, 0, 44) == pytest.approx((-unseen, unseen))


def test_few_units_have_no_interval() -> None:
    few = [0.5, 0.25, 1.0, 0.75]
    assert len(few) < SMALLEST
    for estimate in (mean, rate, positive_mean, exponential_mean, median):
        assert estimate(few)[1] is None
        assert estimate([*few, 0.5, 0.3])[1] is not None
    assert estimate_row(*mean(few)) == {"value": mean(few)[0], "ci95": None}
    for paired in (paired_difference, paired_rates, perplexity_difference):
        assert paired(few, few[::-1])[1] is None
    assert (wilson(2, 4), tango(1, 1, 4), upper_bound(few), standard_error([1.0])) == (None, None, None, None)
    ordered = np.arange(12.0)  # of 5 points in order a bootstrap says [1, 1] nearly always
    assert Resampled.of(11, 0, lambda drawn: ordered[drawn].mean(axis=1)).ci95 is None
    assert Resampled.of(12, 0, lambda drawn: ordered[drawn].mean(axis=1)).ci95 is not None


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (0.996, ".2f", "0.996"),
        (0.9996, ".0%", "99.96%"),
        (0.004, ".0%", "0.4%"),
        (1.0, ".2f", "1.00"),
        (-0.001, ".2f", "-0.001"),
        (1.0e-9, ".2f", "0.00000"),
    ],
)
def test_rounding_makes_nothing_of_hardly_anything(value: float, form: str, text: str) -> None:
    assert rounded_text(value, form) == text


def test_a_reported_mean_has_the_interval_of_its_values() -> None:
    for values in ([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], [1.0] * 6):
        error = standard_error(values)
        assert error is not None
        assert reported_mean(mean(values)[0], error, 6) == pytest.approx(known(rate(values)[1]))
    values = [3.0, 1.0, 2.5, 2.0, 4.0]
    assert reported_mean(2.5, standard_error(values) or 0.0, 5) == pytest.approx(known(mean(values)[1]))
    assert reported_mean(2.5, 0.1, 4) is None


def test_the_value_is_within_its_interval() -> None:
    rng = np.random.default_rng(0)
    for n in (5, 10, 40):
        for values in (rng.random(n).tolist(), [0.1] * n, [0.0] * n, [1e9 + 0.1] * n, rng.lognormal(0, 3, n).tolist()):
            for value, interval in (mean(values), positive_mean(values), rate([min(one, 1.0) for one in values])):
                low, high = known(interval)
                assert low <= value <= high
            assert known(positive_mean(values)[1])[1] >= 0


def test_zeros_and_rounding_below_zero_are_no_logarithms() -> None:
    value, interval = positive_mean([0.0, -1e-9, 0.2, 0.4, 0.6])
    assert value == pytest.approx(0.24)
    assert 0 < known(interval)[0] < value < known(interval)[1] < 1
    assert positive_mean([0.0] * 6) == (0.0, (0.0, 0.0))
    assert upper_bound([0.0] * 6) == 0.0


def test_windows_of_a_document_are_one_unit() -> None:
    assert by_document([1.0, 2.0, 3.0, 7.0], ["a", "b", "a", "b"]) == [2.0, 4.5]
    with pytest.raises(ValueError, match="zip"):
        by_document([1.0], ["a", "b"])


def test_medians_have_the_interval_of_order_statistics() -> None:
    assert median([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == (3.5, (1.0, 6.0))
    assert median([float(value) for value in range(20)]) == (9.5, (5.0, 14.0))


def test_intervals_of_resampled_statistics_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a mean, whose truth is known; and those of two statistics of the same points are paired."""
    monkeypatch.setattr("moacompress.core.statistics.RESAMPLES", 400)
    points = np.random.default_rng(0).normal(size=(DRAWS, 40))

    def draw(number: int) -> Estimate:
        found = Resampled.of(40, number, lambda drawn: points[number][drawn].mean(axis=1))
        return found.value, found.ci95

    assert coverage(draw, 0.0) > 0.90
    one, other = (Resampled.of(40, 3, lambda drawn, by=by: points[0][drawn].mean(axis=1) - by) for by in (0, 1))  # type: ignore[misc]
    assert known((one - other).ci95) == pytest.approx((1.0, 1.0))
