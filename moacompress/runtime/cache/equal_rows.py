"""Rows of a batch that are the same: the repeated ones of beams and return sequences, which share their blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moacompress.core.arrays import Ints
from moacompress.runtime.cache.pool import Ids
from moacompress.runtime.cache.real_tokens import Chunk


def find_equal_rows(lengths: Ints, tables: Sequence[Ids], given: Sequence[torch.Tensor], chunk: Chunk) -> Ints | None:
    """Finds rows that are the same, to the bit, before and in a chunk.

    That their tokens are the same would not be enough (adapters of single rows), so keys and values are compared.

    Args:
        lengths: real tokens of every row before the chunk, `[rows]`.
        tables: the block tables, each `[rows, heads, logical blocks]`.
        given: of the chunk, keys, values and what else counts, `[rows, heads, tokens, ...]`; keys are looked at first.
        chunk: which of its tokens are real.

    Returns:
        The first row that is the same as each, `[rows]`; None where all differ.
    """
    rows = len(lengths)
    if rows < 2 or chunk.columns < 2:
        return None

    def same(row: int, other: int) -> bool:
        return (
            bool(lengths[row] == lengths[other])
            and all(np.array_equal(ids[row], ids[other]) for ids in tables)
            and (chunk.real is None or np.array_equal(chunk.real[row], chunk.real[other]))
            and all(torch.equal(tensor[row], tensor[other]) for tensor in given)
        )

    last = given[0][:, :, -1].detach().contiguous().view(torch.uint8).cpu().numpy().reshape(rows, -1)
    equals = np.arange(rows)
    for members in np.split(*_sorted_groups(np.unique(last, axis=0, return_inverse=True)[1].reshape(-1))):
        for at, row in enumerate(members):
            for other in members[:at]:
                if equals[other] == other and same(row, other):
                    equals[row] = other
                    break
    return equals if bool((equals != np.arange(rows)).any()) else None


def _sorted_groups(numbers: Ints) -> tuple[Ints, Ints]:
    """Returns the places of equal numbers one after the other, and where each group but the first begins."""
    order = np.argsort(numbers, kind="stable")
    return order, np.flatnonzero(np.diff(numbers[order])) + 1
