"""All intervals and tests: one place, so that a number means the same in every table.

Values come one per independent unit: a prompt, a sample, a document, a turn of a timing. Windows of one document are no
units of their own: `by_document` makes one value of them first. Intervals are two-sided at 95% and are None below
`SMALLEST` units. Who is better is never read off an interval: `p_value` tests it, `verdict` says it.

| what | value | interval |
| --- | --- | --- |
| share of yes and no, or shares in [0, 1] | `rate` | Wilson's |
| difference of such, paired | `paired_rates` | Tango's |
| numbers of any sign, differences of such, paired | `mean`, `paired_difference` | Student's t |
| positive numbers with a long tail, such as KL | `positive_mean` | Cox's |
| mean of logarithms, as perplexity or a ratio | `exponential_mean` | of t, its exponential |
| difference of perplexities, paired | `perplexity_difference` | t, linearised |
| median | `median` | order statistics |
| another statistic of points, such as a rank correlation | `Resampled` | percentile bootstrap of the points |

What was chosen of several on the samples that it is tested on looks better than it is: `p_value_of_chosen` allows for that.

Also: `wilson` and `tango` of counts, `reported_mean` (of a mean and its error), `upper_bound` (one-sided, of a positive
mean), `standard_error`, and for JSON and people
`estimate_row`, `estimate_text`, `rounded_text`, `error_text` and `p_text`.

Coverage was simulated, and a test repeats it. Of paired proportions Newcombe's method 10 covers .89 at n = 8 in the worst
case tried and Tango's .93, so Tango's is used. Of shares that are neither 0 nor 1 Student's t covers .44 where nine of ten
are 1 and n = 6, BCa .45; with Wilson's and Tango's formula for the mean, which has the largest spread that any shares of that
mean can have, it never was below .96. Of lognormal means with sigma 1 at n = 6 t and BCa cover .82, Cox's .94.

scipy is imported where it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from moacompress.core.arrays import Bools, Floats, Ints

Interval = tuple[float, float]
Estimate = tuple[float, Interval | None]
"""A value and its 95% interval; None where there are fewer than `SMALLEST` units."""
SMALLEST = 5
"""Units below which no interval is given: at 4 a sign test cannot be below .125, so nothing could be said of them."""
TESTABLE = 6
"""Units below which no test can say that a difference counts: at 5 the smallest two-sided p-value of a sign test is .0625."""
SIGNIFICANT = 0.05
"""The p-value below which a difference counts."""
RESAMPLES = 9_999
"""Of sign flips where there are more than 2^13 of them, and of bootstraps."""
LONGEST_TAIL = 1.5
"""Standard deviation of logarithms above which numbers are not taken for lognormal."""
FEWEST_POINTS = 12
"""Points below which a bootstrap gives no interval: of a rank correlation of .97 it covers .55 at 5, .87 at 8, .98 at 12."""
_Z95 = 1.959963984540054
_PIVOTS = 20_000


def wilson(successes: float, n: int) -> Interval | None:
    """Returns the score interval of a share (Wilson, J. Am. Stat. Assoc. 22, 1927); fractions are allowed, see `rate`."""
    if n < SMALLEST:
        return None
    share, z2 = successes / n, _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(max(share * (1 - share), 0.0) / n + z2 / (4 * n * n))
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def tango(more: float, fewer: float, n: int) -> Interval | None:
    """Returns the score interval of a paired difference of shares, `(more - fewer) / n` (Tango, Stat. Med. 17, 1998).

    `more` and `fewer` count the pairs of which only the first or only the second holds; fractions are allowed.
    """
    if n < SMALLEST:
        return None
    return -_tango_upper(fewer, more, n), _tango_upper(more, fewer, n)


def rate(shares: Sequence[float]) -> Estimate:
    """Returns the mean of shares in [0, 1] (at least one) with Wilson's interval.

    Shares between 0 and 1 get the same one: of all of a mean, zeros and ones have the largest variance, mean (1 - mean)
    (Bhatia and Davis, Am. Math. Mon. 107, 2000), so it covers them too, and is wide where they differ little.
    """
    value = math.fsum(shares) / len(shares)
    return value, _around(value, wilson(math.fsum(shares), len(shares)))


def paired_rates(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Returns the mean of `first - second` of shares in [0, 1], with Tango's interval; both are of the same units in order.

    Differences between -1 and 1 count as as much of a pair: of all with the same mean gain and the same mean loss those of
    -1, 0 and 1 have the largest variance.
    """
    apart = _apart(first, second)
    more, fewer = math.fsum(apart[apart > 0]), -math.fsum(apart[apart < 0])
    value = (more - fewer) / len(apart)
    return value, _around(value, tango(more, fewer, len(apart)))


def mean(values: Sequence[float]) -> Estimate:
    """Returns the mean of numbers (at least one) and Student's t interval (Biometrika 6, 1908)."""
    value = math.fsum(values) / len(values)
    return value, _around(value, _symmetric(value, values))


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Returns the mean of `first - second`, of the same units in order, and Student's t interval."""
    return mean(_apart(first, second).tolist())


def positive_mean(values: Sequence[float]) -> Estimate:
    """Returns the mean of numbers (at least one) that are not negative, such as KL, and Cox's interval with t quantiles.

    `exp(m + s^2/2 +- t sqrt(s^2/n + s^4/(2(n-1))))` with m and s of the logarithms (Olsson, J. Stat. Educ. 13, 2005),
    stretched to the mean where that lies outside. Numbers with a zero, or whose logarithms have an s above `LONGEST_TAIL`, are
    not lognormal; they get `mean exp(+- t e)` with e the standard error as a share of the mean (the t interval of the mean's
    logarithm by the delta method). Below 0, which rounding may give, is 0.
    """
    numbers = np.maximum(np.asarray(values, dtype=np.float64), 0.0)
    value = math.fsum(numbers) / len(numbers)
    if len(numbers) < SMALLEST:
        return value, None
    spread = _lognormal(numbers)
    if spread is None:
        half = _quantile(0.975, len(numbers)) * _relative_error(numbers)
        return value, _around(value, (value * math.exp(-half), value * math.exp(half)))
    centre, s2, n = spread[0] + spread[1] / 2, spread[1], len(numbers)
    half = _quantile(0.975, n) * math.sqrt(s2 / n + s2 * s2 / (2 * (n - 1)))
    return value, _around(value, (math.exp(centre - half), math.exp(centre + half)))


def upper_bound(values: Sequence[float]) -> float | None:
    """Returns what the mean of numbers that are not negative is below, with 95% confidence (one-sided); None below `SMALLEST`.

    The 95% quantile of the generalised pivot of a lognormal mean (Krishnamoorthy and Mathew, J. Stat. Plan. Inference 115,
    2003), which covers .95 at n = 5 too, where Cox's one-sided bound covers .90; at least the mean. What is not lognormal is
    treated as in `positive_mean`.
    """
    numbers = np.maximum(np.asarray(values, dtype=np.float64), 0.0)
    n = len(numbers)
    if n < SMALLEST:
        return None
    value, spread = float(numbers.mean()), _lognormal(numbers)
    if spread is None:
        return value * math.exp(_quantile(0.95, n) * _relative_error(numbers))
    rng = np.random.default_rng(0)
    normal, square = rng.standard_normal(_PIVOTS), rng.chisquare(n - 1, _PIVOTS) / (n - 1)
    pivots = spread[0] + normal * np.sqrt(spread[1] / n / square) + spread[1] / (2 * square)
    return max(value, math.exp(float(np.quantile(pivots, 0.95))))


def reported_mean(value: float, error: float, n: int) -> Interval | None:
    """Returns the interval of a mean of n units of which only its standard error (of the variance over n - 1) is known.

    Wilson's where the error is that of zeros and ones, otherwise t.
    """
    if n < SMALLEST:
        return None
    if 0 <= value <= 1 and math.isclose(error**2 * (n - 1), value * (1 - value), rel_tol=1e-6, abs_tol=1e-12):
        return _around(value, wilson(value * n, n))
    half = _quantile(0.975, n) * error
    return value - half, value + half


def exponential_mean(logs: Sequence[float]) -> Estimate:
    """Returns `exp` of the mean and of the ends of its t interval: perplexity from NLL, or a mean ratio from log-ratios."""
    value, interval = mean(logs)
    return math.exp(value), None if interval is None else (math.exp(interval[0]), math.exp(interval[1]))


def perplexity_difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Returns `exp(mean(first)) - exp(mean(second))` and the t interval of its linearisation at the two means.

    Values are NLL in nats per token, one per document, of the same documents in order.
    """
    left, right = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    one, other = math.exp(math.fsum(left) / len(left)), math.exp(math.fsum(right) / len(right))
    if len(left) != len(right):
        raise ValueError(f"{len(left)} values are paired with {len(right)}")
    linear = one * (left - left.mean()) - other * (right - right.mean())
    return one - other, _around(one - other, _symmetric(one - other, linear.tolist()))


def median(values: Sequence[float]) -> Estimate:
    """Returns the median and its interval by order statistics (Hahn and Meeker, Statistical Intervals, 1991).

    It assumes nothing of how values are spread; it exists from 6 values on, of which it is all.
    """
    from scipy.stats import binom

    found = sorted(values)
    n, value = len(found), float(np.median(found))
    below = int(binom.ppf(0.025, n, 0.5))
    return value, (found[below - 1], found[n - below]) if below else None


def by_document(values: Sequence[float], documents: Sequence[Hashable]) -> list[float]:
    """Returns one value for each document, the mean of its windows or samples, in the order in which documents come first."""
    groups: dict[Hashable, list[float]] = {}
    for value, document in zip(values, documents, strict=True):
        groups.setdefault(document, []).append(value)
    return [math.fsum(group) / len(group) for group in groups.values()]


def p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns the two-sided p-value of `first` and `second`, of the same units in order, being alike; 1 where no pair differs.

    Yes and no: the exact test of McNemar (Psychometrika 12, 1947), a sign test of the pairs that differ. Other numbers: the
    sign-flip permutation test of the mean difference (Fisher, The Design of Experiments, 1935), over all flips up to 13
    pairs that differ, otherwise over `RESAMPLES` random ones, always the same.
    """
    apart = _apart(first, second)
    apart = apart[apart != 0]
    if not len(apart):
        return 1.0
    if np.isin(apart, (-1.0, 1.0)).all():
        from scipy.stats import binomtest

        return float(binomtest(int((apart > 0).sum()), len(apart)).pvalue)
    sums, least = np.abs(_flips(len(apart)) @ apart), abs(float(apart.sum())) * (1 - 1e-12)
    return _share_beyond(sums >= least, len(apart))


def p_value_of_chosen(chosen: Sequence[float], others: Iterable[Sequence[float]], reference: Sequence[float]) -> float:
    """Returns the p-value of `chosen` and `reference` being alike, where `chosen` was picked among others on the same units.

    The sign-flip test of `p_value`, whose statistic is the largest of all candidates' standardised differences under the same
    flips (the single-step max-T of Westfall and Young, Resampling-Based Multiple Testing, 1993). Without others it is that of
    `p_value`. It is 1 where `chosen` and `reference` do not differ.
    """
    apart = np.stack([_apart(one, reference) for one in (chosen, *others)])
    lengths = np.sqrt((apart**2).sum(1))
    if not lengths[0]:
        return 1.0
    apart = apart[lengths > 0] / lengths[lengths > 0, None]
    apart = apart[:, (apart != 0).any(0)]
    flips = _flips(apart.shape[1])
    largest, least = np.abs(flips @ apart.T).max(1), abs(float(apart[0].sum())) * (1 - 1e-12)
    return _share_beyond(largest >= least, apart.shape[1])


def verdict(first: Sequence[float], second: Sequence[float]) -> int:
    """Returns 1 where `first` is higher, -1 where `second` is, by `p_value` below `SIGNIFICANT`; otherwise 0."""
    if p_value(first, second) >= SIGNIFICANT:
        return 0
    return 1 if math.fsum(_apart(first, second)) > 0 else -1


def standard_error(values: Sequence[float]) -> float | None:
    """Returns the standard error of the mean; None of fewer than two values."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def estimate_row(value: float, interval: Interval | None) -> dict[str, Any]:
    """Returns an estimate as JSON has it: `value`, and `ci95`, null where there is none."""
    return {"value": value, "ci95": None if interval is None else list(interval)}


@dataclass(frozen=True)
class Resampled:
    """A statistic of points that has no formula for its interval, with its bootstrap.

    Attributes:
        value: of all points.
        resampled: of resampled points, [resamples]; those of two statistics of the same points are paired.
        points: how many points.
    """

    value: float
    resampled: Floats
    points: int

    @staticmethod
    def of(points: int, seed: int, statistic: Callable[[Ints], Floats]) -> Resampled:
        """Resamples a statistic, which maps indices of points `[rows, points]` to values `[rows]`, NaN where there is none."""
        whole, draws = np.arange(points)[None], np.random.default_rng(seed).integers(points, size=(RESAMPLES, points))
        return Resampled(float(statistic(whole)[0]), statistic(draws), points)

    @property
    def ci95(self) -> Interval | None:
        """The 2.5% and 97.5% quantiles of what could be computed of the bootstrap (Efron, Ann. Stat. 7, 1979).

        None below `FEWEST_POINTS`: few points that happen to be in order give `[1, 1]`.
        """
        found = self.resampled[np.isfinite(self.resampled)]
        if self.points < FEWEST_POINTS or not len(found):
            return None
        low, high = np.quantile(found, (0.025, 0.975))
        return float(low), float(high)

    def __sub__(self, other: Resampled) -> Resampled:
        return Resampled(self.value - other.value, self.resampled - other.resampled, self.points)


def _apart(first: Sequence[float], second: Sequence[float]) -> Floats:
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values are paired with {len(second)}")
    apart = np.subtract(first, second, dtype=np.float64)
    if not np.isfinite(apart).all():
        raise ValueError("a number is not finite: of such nothing can be tested")
    return apart


def _flips(n: int) -> Floats:
    """Returns signs of -1 and 1, [flips, n]: all that there are if these are few, otherwise random ones."""
    if 2**n <= RESAMPLES:
        return np.asarray(((np.arange(2**n)[:, None] >> np.arange(n)) & 1) * 2.0 - 1, np.float64)
    return np.asarray(np.random.default_rng(0).integers(2, size=(RESAMPLES, n)) * 2.0 - 1, np.float64)


def _share_beyond(beyond: Bools, n: int) -> float:
    """Returns the p-value of `_flips(n)` of which some come to as much as what was found, [flips]."""
    count, all_of_them = int(beyond.sum()), 2**n == len(beyond)
    return count / len(beyond) if all_of_them else (count + 1) / (len(beyond) + 1)


def _tango_upper(more: float, fewer: float, n: int) -> float:
    """Returns the difference above the estimate at which its score is the normal quantile, by bisection."""

    def beyond(apart: float) -> bool:
        # the probability of `fewer` that is likeliest where the difference is `apart` solves a x^2 + b x + c = 0
        a, b, c = 2 * n, (2 * n - more + fewer) * apart - more - fewer, -fewer * apart * (1 - apart)
        likeliest = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = max(n * (2 * likeliest + apart * (1 - apart)), 0.0)
        return more - fewer - n * apart + _Z95 * math.sqrt(variance) < 0

    low, high = (more - fewer) / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return high


def _lognormal(numbers: Floats) -> tuple[float, float] | None:
    """Returns mean and variance of the logarithms; None where the numbers cannot be taken for lognormal."""
    if not (numbers > 0).all():
        return None
    logs = np.log(numbers)
    variance = float(logs.var(ddof=1))
    return (float(logs.mean()), variance) if variance <= LONGEST_TAIL**2 else None


def _relative_error(numbers: Floats) -> float:
    """Returns the standard error as a share of the mean, at most 1; 0 where all numbers are 0."""
    value = float(numbers.mean())
    return float(numbers.std(ddof=1)) / math.sqrt(len(numbers)) / value if value else 0.0


@lru_cache(maxsize=1024)
def _quantile(share: float, n: int) -> float:
    from scipy.stats import t

    return float(t.ppf(share, n - 1))


def _symmetric(value: float, values: Sequence[float]) -> Interval | None:
    """Returns the t interval around a value that the spread of values has."""
    error = standard_error(values)
    if len(values) < SMALLEST or error is None:
        return None
    half = _quantile(0.975, len(values)) * error
    return value - half, value + half


def _around(value: float, interval: Interval | None) -> Interval | None:
    """Returns the interval, with the value in it whatever the last bits of its ends are."""
    return None if interval is None else (min(interval[0], value), max(interval[1], value))
