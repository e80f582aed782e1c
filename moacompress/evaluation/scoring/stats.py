"""Intervals: Wilson's for shares of yes and no, percentile bootstraps for means and for paired differences.

All intervals are of 95%. The bootstrap's seed is fixed by the caller, so the same scores give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Interval = tuple[float, float]
RESAMPLES = 10_000
FLOOR = 0.2
"""A rate whose interval ends below this is at floor: the model cannot do the task, and losing nothing proves nothing."""
_Z95 = 1.959963984540054
_CHUNK = 10**7
"""Numbers that resamples in memory at a time have."""


def wilson(successes: float, n: int) -> Interval:
    """Returns Wilson's 95% score interval of a share.

    Args:
        successes: how often it held, `0 <= successes <= n`. Half a success is allowed: of all numbers in [0, 1] with
            the same mean, zeros and ones spread most, so the interval is then wide rather than narrow.
        n: how often it was tried, at least 1.
    """
    share, z2 = successes / n, _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def bootstrap_mean(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Returns the 95% percentile bootstrap interval of the mean of `values` (at least one)."""
    return _bootstrap(np.mean, [values], seed, resamples)


def mean(values: Sequence[float], seed: int = 0) -> tuple[float, Interval]:
    """Returns the mean of numbers of any size and its bootstrap interval."""
    value = math.fsum(values) / len(values)
    return value, _around(value, bootstrap_mean(values, seed))


def rate(values: Sequence[float], seed: int = 0) -> tuple[float, Interval]:
    """Returns the mean of shares in [0, 1] and its interval.

    Wilson's where every share is 0 or 1, or where all are the same and a bootstrap would see no spread; otherwise the
    bootstrap's.
    """
    value = math.fsum(values) / len(values)
    if all(share in (0.0, 1.0) for share in values) or len(set(values)) == 1:
        return value, _around(value, wilson(math.fsum(values), len(values)))
    return value, _around(value, bootstrap_mean(values, seed))


def retained(dense: Sequence[float], model: Sequence[float]) -> list[float]:
    """Returns exact match of a model on the prompts that dense gets fully right; arguments as of `retention`."""
    return [ours for theirs, ours in zip(dense, model, strict=True) if theirs == 1.0]


def retention(dense: Sequence[float], model: Sequence[float], seed: int = 0) -> tuple[float, Interval, int] | None:
    """Returns what a model keeps of what dense can do.

    Args:
        dense: exact match of the dense model, one a prompt.
        model: of the other model on the same prompts, in the same order.
        seed: of the resampling.

    Returns:
        The model's mean exact match on the prompts that dense gets fully right, its interval as in `rate`, and the
        number of these prompts; None where there are none.
    """
    kept = retained(dense, model)
    return (*rate(kept, seed), len(kept)) if kept else None


def paired_difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> tuple[float, Interval]:
    """Returns the mean of `first - second` and its 95% paired bootstrap interval.

    Args:
        first: scores of one model, one a prompt.
        second: scores of another on the same prompts, in the same order.
        seed: of the resampling.
    """
    return mean(np.subtract(first, second, dtype=np.float64).tolist(), seed)


def paired_rates(first: Sequence[float], second: Sequence[float], seed: int = 0) -> tuple[float, Interval]:
    """As `paired_difference`, of shares in [0, 1].

    Where the difference is the same on every prompt a bootstrap would see no spread. Then as many prompts as Wilson's interval
    allows of what none of them shows might have differed by -1, or by 1.
    """
    value, interval = paired_difference(first, second, seed)
    if len({ours - theirs for ours, theirs in zip(first, second, strict=True)}) == 1:
        unseen = wilson(0, len(first))[1]
        interval = value - unseen * (1 + value), value + unseen * (1 - value)
    return value, interval


def perplexity_difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> tuple[float, Interval]:
    """Returns `exp(mean(first)) - exp(mean(second))` and its 95% paired bootstrap interval.

    Args:
        first: NLL of one model, nats a token, one a window.
        second: NLL of another on the same windows, in the same order.
        seed: of the resampling.
    """
    value = math.exp(math.fsum(first) / len(first)) - math.exp(math.fsum(second) / len(second))
    return value, _around(value, _bootstrap(_perplexities_apart, [first, second], seed))


def _perplexities_apart(first: Any, second: Any, axis: int) -> Any:
    return np.exp(first.mean(axis)) - np.exp(second.mean(axis))


def _bootstrap(
    statistic: Callable[..., Any], columns: Sequence[Sequence[float]], seed: int, resamples: int = RESAMPLES
) -> Interval:
    """Returns the 95% percentile interval of a statistic of columns; every resample takes the same rows of all of them."""
    from scipy import stats

    data = [np.asarray(column, dtype=np.float64) for column in columns]
    rows = len(data[0])
    if rows == 1:  # scipy asks for two
        return (float(statistic(*data, axis=0)),) * 2
    low, high = stats.bootstrap(
        data,
        statistic,
        n_resamples=resamples,
        batch=max(1, _CHUNK // rows),
        paired=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(low), float(high)


def _around(value: float, interval: Interval) -> Interval:
    """Returns the interval, with the value in it whatever the last bits of its ends are."""
    return min(interval[0], value), max(interval[1], value)
