"""The arrays that numbers are kept in, by what they hold, and ranges of numbers one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]
Floats32: TypeAlias = npt.NDArray[np.float32]
Bools: TypeAlias = npt.NDArray[np.bool_]


def ragged_ranges(low: Ints, high: Ints) -> tuple[Ints, Ints]:
    """Returns the numbers of many ranges `[low, high)`, one range after another; one with `high <= low` is empty.

    Returns:
        `(owner, number)`, each `[sum of sizes]`: the flat index of the range, and the number.
    """
    low, high = low.reshape(-1), high.reshape(-1)
    sizes = np.maximum(high - low, 0)
    total = int(sizes.sum())
    owner = np.repeat(np.arange(len(low)), sizes)
    number = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes) + np.repeat(low, sizes)
    return owner, number


def spread_over(items: Sequence[T], count: int) -> list[T]:
    """Returns at most `count` items from all over a list, in its order."""
    if len(items) <= count:
        return list(items)
    return [items[int(index)] for index in np.linspace(0, len(items) - 1, count).round()]


def row_parts(rows: int, columns: int, numbers: int) -> Iterator[slice]:
    """Yields slices of rows, one after the other, which have about so many numbers each and at least one row."""
    step = max(1, numbers // max(1, columns))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))
