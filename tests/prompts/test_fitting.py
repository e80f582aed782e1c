"""Fitting finds the largest number of pieces, and asks for few prompts on the way."""

from __future__ import annotations

from collections.abc import Callable

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
@pytest.mark.parametrize("length", [100, 101, 1024, 2048, 4096])
@pytest.mark.parametrize("limit", [0, 1, 50, 3000])
def test_largest(tokens: Callable[[int], int], length: int, limit: int) -> None:
    asked: list[int] = []

    def counted(count: int) -> int:
        asked.append(count)
        return tokens(count)

    found = largest_fit(counted, length, limit, "t")
    assert found == max(count for count in range(limit + 1) if tokens(count) <= length)
    assert len(asked) <= 30
    assert max(asked) <= limit


def test_few_prompts_where_pieces_are_alike() -> None:
    asked: list[int] = []
    largest_fit(lambda count: asked.append(count) or unevenly(count), 2048, 900, "t")  # type: ignore[func-returns-value]
    assert len(asked) <= 10


def test_too_long() -> None:
    with pytest.raises(DataError, match="a prompt of task t takes at least 100 tokens; 99 were asked for"):
        largest_fit(evenly, 99, 10, "t")
