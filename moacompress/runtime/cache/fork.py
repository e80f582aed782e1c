"""Sharing a prefix: forks of a layer's blocks, which keep one memory until one of them writes, and copies to be kept."""

from __future__ import annotations

from typing import Any, TypeAlias

from moacompress.core.arrays import Ints
from moacompress.rules.rule_table import RuleTable
from moacompress.runtime.cache.layer_blocks import LayerBlocks
from moacompress.runtime.cache.pool import Ids, Pool, Table

Packed: TypeAlias = tuple[Pool, Ids, Ints, Ints]
"""A pool with just the blocks in use, their table, the lengths and the runs."""


def fork(held: LayerBlocks) -> LayerBlocks:
    """Returns the same content; blocks are shared until one of the two writes to them."""
    table = Table(0, held.heads)
    table.ids = held.table.ids.copy()
    with held.pool.lock:
        held.pool.retain(table.ids)
    return LayerBlocks(held.rules, held.pool, table, held.lengths.copy(), held.runs.copy())


def pack(held: LayerBlocks) -> Packed:
    """Returns the content with memory of its own, to be pickled: what reads it could never free blocks of forks."""
    with held.pool.lock:
        return (*held.pool.only(held.table.ids), held.lengths, held.runs)


def unpack(rules: RuleTable, packed: Any) -> LayerBlocks:
    """Returns what `pack` was given."""
    pool, ids, lengths, runs = packed
    table = Table(0, len(rules))
    # arrays that were read from buffers of the caller's are not ours to write to
    table.ids = ids.copy()
    return LayerBlocks(rules, pool, table, lengths.copy(), runs.copy())
