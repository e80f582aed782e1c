"""Rows of two caches in one: what lets a row join a batch that is being decoded. No key or value is moved."""

from __future__ import annotations

import numpy as np

from moacompress.core.arrays import Bools
from moacompress.runtime.cache.layer_blocks import LayerBlocks
from moacompress.runtime.cache.pool import Ids, Table


def join(held: LayerBlocks, other: LayerBlocks) -> LayerBlocks:
    """Returns the rows of both, those of the first before those of the other, whose blocks are then theirs no more.

    Args:
        held: blocks in a pool.
        other: blocks in the same pool.
    """
    with held.pool.lock:
        for each in (held, other):
            each.give_back.detach()  # the blocks change hands
        tables = [
            Table.of(_below(one.ids, another.ids)) for one, another in zip(held.tables, other.tables, strict=True)
        ]
        lengths = np.concatenate([held.lengths, other.lengths])
        runs = np.concatenate([held.runs, other.runs], axis=2)
        return LayerBlocks(held.rules, held.pool, tables[0], lengths, runs, *tables[1:])


def _below(ids: Ids, more: Ids) -> Ids:
    """Returns the ids of both, `[rows, heads, logical blocks]`, as wide as the wider one."""
    width = max(ids.shape[2], more.shape[2])
    return np.concatenate(
        [np.pad(each, ((0, 0), (0, 0), (0, width - each.shape[2])), constant_values=-1) for each in (ids, more)]
    )


def left_padded(seen: Bools, more: Bools) -> Bools:
    """Returns which tokens are real for the rows of both, `[rows, columns]`, of no more columns than a row needs.

    Args:
        seen: of the first, `[rows, columns]`.
        more: of the other, `[rows, columns]`.
    """
    columns = max(seen.shape[1], more.shape[1])
    real = np.concatenate([np.pad(each, ((0, 0), (columns - each.shape[1], 0))) for each in (seen, more)])
    return real[:, int(np.argmax(real.any(axis=0))) :]
