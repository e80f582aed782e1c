"""Intervals: Wilson's for shares, percentile bootstraps for means and for paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float]
RESAMPLES = 10_000
_Z95 = 1.959963984540054
_CHUNK = 10**7


def wilson(successes: int, n: int) -> Interval:
    """Returns Wilson's 95% score interval of a share.

    Args:
        successes: how often it held, `0 <= successes <= n`.
        n: how often it was tried, at least 1.
    """
    share, z2 = successes / n, _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def bootstrap_mean(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Returns the 95% percentile bootstrap interval of the mean of `values` (at least one)."""
    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(data))
    means = [
        data[rng.integers(len(data), size=(min(rows, resamples - done), len(data)))].mean(axis=1)
        for done in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def paired_difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> tuple[float, Interval]:
    """Returns the mean of `first - second` and its 95% paired bootstrap interval.

    Args:
        first: scores of one model, one a prompt.
        second: scores of another on the same prompts, in the same order.
        seed: of the resampling.
    """
    differences = np.subtract(first, second, dtype=np.float64)
    return float(differences.mean()), bootstrap_mean(differences.tolist(), seed)
