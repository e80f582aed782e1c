"""Fitting finds the largest number of pieces, and asks for few prompts on the way."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from moacompress.core.errors import DataError
from moacompress.prompts.fitting import largest_fit


def evenly(count: int) -> int:
    return 100 + 7 * count


def unevenly(count: int) -> int:
    return 100 + int(SIZES[:count].sum())


def in_steps(count: int) -> int:
    return 100 + 40 * (count // 30)


def faster_and_faster(count: int) -> int:
    return 100 + count * count


SIZES = np.random.default_rng(0).integers(1, 6, 3000)
SIZES[1000:] *= 3


@pytest.mark.parametrize("tokens", [evenly, unevenly, in_steps, faster_and_faster])
def test_largest(tokens: Callable[[int], int]) -> None:
    for length, limit in product((100, 101, 1024, 4096), (0, 1, 50, 900, 3000)):
        asked: list[int] = []

        def counted(count: int, asked: list[int] = asked) -> int:
            asked.append(count)
            return tokens(count)

        found = largest_fit(counted, length, limit, "t")
        assert found == max(count for count in range(limit + 1) if tokens(count) <= length)
        assert len(asked) <= (10 if tokens in (evenly, unevenly) and limit == 900 else 30)
        assert max(asked) <= limit


def test_too_long() -> None:
    with pytest.raises(DataError, match="a prompt of task t takes at least 100 tokens; 99 were asked for"):
        largest_fit(evenly, 99, 10, "t")
