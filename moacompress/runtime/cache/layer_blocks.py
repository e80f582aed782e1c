"""What the cache of one layer holds: blocks in a pool, and a block table for every row and KV head.

Token j of a row lives in its head's logical block j // 16. Which logical blocks are there follows from the number of tokens
in the row by arithmetic (`block_runs`), so growing appends a block, forgetting frees one, and nothing is ever moved. The
tokens of a row are those that its mask calls real: padding is never written and never counted.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from moacompress.core.arrays import Ints, ragged_ranges
from moacompress.kernels.arguments import AllocationShortfall, CacheState, CacheView
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import BLOCK
from moacompress.runtime.cache.block_runs import no_runs
from moacompress.runtime.cache.pool import Ids, Layout, Pool, SharedFormats, Table

Packed: TypeAlias = tuple[Pool, list[Ids], Ints, Ints]
"""A pool with just the blocks in use, the tables, the lengths and the runs."""


class Past(NamedTuple):
    """What a layer's cache kept of its gates' choice before a chunk.

    Attributes:
        lengths: real tokens of every row then, `[rows]`.
        selected: see `LayerBlocks`; its blocks are not written to again.
    """

    lengths: Ints
    selected: Table


class LayerBlocks:
    """The blocks of one layer.

    Args:
        rules: of the KV heads, in numpy.
        pool: where the blocks lie; forks share it.
        table: which block is which; its blocks are given back when this is dropped.
        lengths: real tokens of every row, int64 `[rows]`.
        runs: the logical blocks held, int64 `[RUNS, 2, rows, heads]`; compiled kernels write to it.
        selected: which blocks hold the tokens that gates select, from the first place on; None where no rule selects.

    Attributes:
        left: number of tokens evicted from the windows, which have competed to be kept, int64 `[rows, heads]`, where rules
            select; compiled kernels write to it.
        past: what `selected` was before the last chunks, oldest first, for rolling back; what it names is counted.
    """

    def __init__(
        self, rules: RuleTable, pool: Pool, table: Table, lengths: Ints, runs: Ints, selected: Table | None = None
    ) -> None:
        self.rules, self.pool, self.table, self.lengths, self.runs = rules, pool, table, lengths, runs
        self.selected = Table(len(lengths), len(rules)) if selected is None and rules.selects else selected
        self.past: list[Past] = []
        self.move_to(lengths)
        # a fork that is dropped gives its blocks back to those that live on
        self.give_back = weakref.finalize(self, _give_back, pool, self.tables, self.past)
        self.give_back.atexit = False

    @staticmethod
    def none(
        rules: RuleTable,
        key: torch.Tensor,
        value: torch.Tensor,
        shared_values: SharedFormats = (),
        pool: Pool | None = None,
    ) -> LayerBlocks:
        """Returns no blocks yet, for chunks like these: `[rows, kv_heads, tokens, dim]` each.

        `pool`: where the blocks will lie; by default in one of their own.
        """
        rows, heads = key.shape[0], len(rules)
        lengths = np.zeros(rows, np.int64)
        if pool is None:
            layout = Layout.of(rules, key.shape[-1], value.shape[-1], key.dtype, shared_values)
            pool = Pool(layout, key.device)
        return LayerBlocks(rules, pool, Table(rows, heads), lengths, no_runs(rows, heads))

    def move_to(self, lengths: Ints) -> None:
        """Takes note of the tokens of the rows, `[rows]`, when what they need is there."""
        self.lengths = lengths
        self.left: Ints = np.zeros((0, 0), np.int64)
        if self.selected is not None:
            self.left = np.ascontiguousarray(self.rules.tokens_left(lengths))

    @property
    def heads(self) -> int:
        """KV heads."""
        return len(self.rules)

    @property
    def tables(self) -> tuple[Table, ...]:
        """All tables that name blocks."""
        return (self.table,) if self.selected is None else (self.table, self.selected)

    @property
    def named(self) -> Ids:
        """What all tables name, one after the other; below 0 there is no block."""
        return np.concatenate([table.ids.reshape(-1) for table in self.tables])

    @property
    def used(self) -> int:
        """Blocks in use, those that other caches use too included."""
        return int(np.count_nonzero(np.unique(self.named) >= 0))

    @property
    def used_bytes(self) -> int:
        """Bytes of `used`."""
        return self.pool.bytes_of(self.named)

    def has_memory_for(self, like: torch.Tensor) -> bool:
        """Whether a compiled step can put keys and values like these into the pool as they are."""
        return bool(self.pool.keys) and self.pool.told_apart and self.pool.layout.dtype == like.dtype

    def view(self) -> CacheView:
        """Returns what attention reads of sinks and windows."""
        return self._view(self.table)

    def view_selected(self) -> CacheView:
        """Returns what attention reads of the tokens that gates select: from the position 0 on, in no order."""
        assert self.selected is not None
        return self._view(self.selected)

    def _view(self, table: Table) -> CacheView:
        with self.pool.lock:  # a fork in another thread may be adding a segment
            segments = [*self.pool.keys], [*self.pool.values]
            return CacheView(*segments, torch.from_numpy(table.ids), self.pool.layout.value_dim)

    def view_shared_values(self, head_map: Ints, value_sets: Ints) -> CacheView:
        """Returns what the attention of a layer that shares the keys reads: its own values lie beside those of the blocks.

        Where its KV heads need other value sets, the segments come once more for each, and block ids count on through them.

        `head_map`: the KV head whose blocks each of its heads reads, `[heads]`. `value_sets`: which values beside the blocks'
        own those of each head are, `[heads]`.
        """
        with self.pool.lock:
            used, number = np.unique(value_sets, return_inverse=True)
            keys = self.pool.keys * len(used)
            values = [segment for value_set in used.tolist() for segment in self.pool.shared_values_of(value_set)]
            ids, step = self.table.ids[:, head_map], len(self.pool.refs)
            ids = np.ascontiguousarray(np.where(ids >= 0, ids + (number * step)[:, None], -1), np.int32)
            return CacheView(keys, values, torch.from_numpy(ids), self.pool.layout.value_dim)

    def state(self, lag: int) -> CacheState:
        """Returns what a compiled step reads and writes; the pool's lock is held while it is used."""
        table, lengths, runs, refs = map(torch.from_numpy, (self.table.ids, self.lengths, self.runs, self.pool.refs))
        selected, left = (
            (None, None) if self.selected is None else map(torch.from_numpy, (self.selected.ids, self.left))
        )
        return CacheState(
            self.pool.keys, self.pool.values, table, lengths, runs, refs, lag, self.pool.value_sets(), selected, left
        )

    def allocate(self, shortfall: AllocationShortfall) -> None:
        """Gives a compiled step what it lacks; the pool's lock is held."""
        if shortfall.blocks:
            self.pool.grow(shortfall.blocks, shortfall.head)
            return
        self.table.widen(int(self.lengths.max()) // BLOCK + 1)
        if self.selected is not None:
            self.selected.widen(int(self.rules.selected(self.lengths + 1).max()) // BLOCK + 1)

    def select(self, rows: Ints) -> None:
        """Makes the given rows, with repeats, the rows of the cache; they share their blocks until they are written to."""
        for table in (*self.tables, *(each.selected for each in self.past)):
            old = table.ids
            with self.pool.lock:
                self.pool.retain(old[rows])
                self.pool.release(old)
            table.ids = old.take(rows, axis=0)
        self.past[:] = [each._replace(lengths=each.lengths[rows]) for each in self.past]
        self.move_to(self.lengths[rows])
        self.runs = self.runs.take(rows, axis=2)

    def fork(self) -> LayerBlocks:
        """Returns the same content; blocks are shared until one of the two writes to them."""
        tables = [Table.of(table.ids) for table in self.tables]
        past = [Past(each.lengths.copy(), Table.of(each.selected.ids)) for each in self.past]
        with self.pool.lock:
            for table in (*tables, *(each.selected for each in past)):
                self.pool.retain(table.ids)
        other = LayerBlocks(self.rules, self.pool, tables[0], self.lengths.copy(), self.runs.copy(), *tables[1:])
        other.past += past
        return other

    def pack(self) -> Packed:
        """Returns the content with memory of its own, to be pickled: what reads it could never free blocks of forks."""
        with self.pool.lock:
            pool, ids = self.pool.only(self.named)
            sizes = np.cumsum([table.ids.size for table in self.tables])[:-1]
            parts = zip(np.split(ids, sizes), self.tables, strict=True)
            return pool, [part.reshape(table.ids.shape) for part, table in parts], self.lengths, self.runs

    @staticmethod
    def unpack(rules: RuleTable, packed: Any) -> LayerBlocks:
        """Returns what `pack` was given."""
        pool, tables, lengths, runs = packed
        # arrays that were read from buffers of the caller's are not ours to write to
        first, *selected = map(Table.of, tables)
        return LayerBlocks(rules, pool, first, lengths.copy(), runs.copy(), *selected)

    def join(self, other: LayerBlocks) -> LayerBlocks:
        """Returns the rows of this and of another in the same pool, whose blocks are then theirs no more; nothing is moved."""
        with self.pool.lock:
            for each in (self, other):
                each.give_back.detach()  # the blocks change hands
            tables = [_below(one.ids, another.ids) for one, another in zip(self.tables, other.tables, strict=True)]
            lengths = np.concatenate([self.lengths, other.lengths])
            runs = np.concatenate([self.runs, other.runs], axis=2)
            return LayerBlocks(self.rules, self.pool, tables[0], lengths, runs, *tables[1:])

    def roll_back(self, lengths: Ints) -> None:
        """Forgets the tokens of rows beyond earlier lengths, `[rows]`, which are known to be there still."""
        end = -(-lengths[:, None] // BLOCK)
        with self.pool.lock:
            for low, high in self.runs:
                self.drop(*ragged_ranges(np.maximum(low, end), high))
        self.runs = np.minimum(self.runs, end)
        self.move_to(lengths)

    def drop(self, owner: Ints, number: Ints) -> None:
        """Gives back blocks; the pool's lock is held.

        `owner`: row * heads + head of each. `number`: its logical number.
        """
        if not len(owner):
            return
        rows, heads = np.divmod(owner, self.heads)
        self.pool.release(self.table.ids[rows, heads, number])
        self.table.ids[rows, heads, number] = -1


def _give_back(pool: Pool, tables: tuple[Table, ...], past: list[Past]) -> None:
    with pool.lock:
        for table in (*tables, *(each.selected for each in past)):
            pool.release(table.ids)


def _below(ids: Ids, more: Ids) -> Table:
    """Returns a table of the ids of both, `[rows, heads, logical blocks]`, as wide as the wider one."""
    width = max(ids.shape[2], more.shape[2])
    padded = [np.pad(each, ((0, 0), (0, 0), (0, width - each.shape[2])), constant_values=-1) for each in (ids, more)]
    return Table.of(np.concatenate(padded))
