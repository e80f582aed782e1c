"""Sharing a prefix: forks of a layer's blocks, which keep one memory until one of them writes, and copies to be kept."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from moacompress.core.arrays import Ints
from moacompress.rules.rule_table import RuleTable
from moacompress.runtime.cache.layer_blocks import LayerBlocks, Past
from moacompress.runtime.cache.pool import Ids, Pool, Table

Packed: TypeAlias = tuple[Pool, list[Ids], Ints, Ints]
"""A pool with just the blocks in use, the tables, the lengths and the runs."""


def fork(held: LayerBlocks) -> LayerBlocks:
    """Returns the same content; blocks are shared until one of the two writes to them."""
    tables = [Table.of(table.ids) for table in held.tables]
    past = [Past(each.lengths.copy(), Table.of(each.selected.ids)) for each in held.past]
    with held.pool.lock:
        for table in (*tables, *(each.selected for each in past)):
            held.pool.retain(table.ids)
    other = LayerBlocks(held.rules, held.pool, tables[0], held.lengths.copy(), held.runs.copy(), *tables[1:])
    other.past += past
    return other


def pack(held: LayerBlocks) -> Packed:
    """Returns the content with memory of its own, to be pickled: what reads it could never free blocks of forks."""
    with held.pool.lock:
        pool, ids = held.pool.only(held.named)
        sizes = np.cumsum([table.ids.size for table in held.tables])[:-1]
        tables = [part.reshape(table.ids.shape) for part, table in zip(np.split(ids, sizes), held.tables, strict=True)]
        return pool, tables, held.lengths, held.runs


def unpack(rules: RuleTable, packed: Any) -> LayerBlocks:
    """Returns what `pack` was given."""
    pool, tables, lengths, runs = packed
    # arrays that were read from buffers of the caller's are not ours to write to
    first, *selected = map(Table.of, tables)
    return LayerBlocks(rules, pool, first, lengths.copy(), runs.copy(), *selected)
