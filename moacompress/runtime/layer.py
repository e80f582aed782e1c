"""The cache of one layer: a block table for every row and KV head, and what a forward does to it.

Token j of a row lives in its head's logical block j // 16. Which logical blocks are there follows from the number of tokens
in the row by arithmetic (`plan.block_runs`), so growing appends a block, forgetting frees one, and nothing is ever moved.
The tokens of a row are those that its mask calls real: padding is never written and never counted.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from moacompress.core.arrays import Ints
from moacompress.core.errors import UnsupportedError
from moacompress.kernels import dispatch
from moacompress.kernels.reference import Keys
from moacompress.rules.rule import Rule
from moacompress.rules.windows import BLOCK
from moacompress.runtime.block_runs import LAG, RunRule, Runs
from moacompress.runtime.blocks import Pool, Table, ragged_ranges
from moacompress.runtime.equal_rows import find_equal_rows
from moacompress.runtime.real_tokens import Chunk, Group

LONGEST_LOOK = 4096
"""Steps over which the largest cache on the way to a reserved length is looked for."""


class PlanCacheLayer(CacheLayerMixin):
    """The cache of one layer; the attention reads and commits it, transformers only asks for its length.

    Args:
        rules: the rule of every KV head.
        min_window: the plan's smallest window, tokens.
        native_window: the layer's own sliding window in tokens, or None.
        reserve: tokens of a row for which memory is taken at once, or None.

    Attributes:
        columns: tokens fed so far, padding included; transformers' length.
        lengths: real tokens of every row, `[rows]`.
        stepping: whether a compiled call has begun whose token is not counted yet; after a forward, that it was interrupted.
        record_past: whether `LAG` tokens are kept longer, so that drafts can be rolled back.
    """

    is_compileable = False
    supports_early_init = False
    is_sliding = False

    def __init__(
        self, rules: Sequence[Rule], min_window: int, native_window: int | None, reserve: int | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rules = tuple(rules)
        self._rule = RunRule(self.rules, min_window, native_window)
        self.reserve = reserve
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        heads = len(self.rules)
        self.columns = 0
        self.lengths: Ints = np.zeros(0, np.int64)
        self._runs = Runs.none(0, heads)
        self._table = Table(0, heads)
        self._pool: Pool | None = None
        self._pending: tuple[torch.Tensor, torch.Tensor] | None = None
        self.stepping = False
        self.is_initialized = False
        self._finalizer: Any = None

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether drafts can be rolled back: while a little more than the plan's is kept."""
        return self.record_past

    @property
    def lag(self) -> int:
        """Tokens that are kept longer than the plan says, so that drafts can be rolled back."""
        return LAG if self.record_past else 0

    @property
    def batch_size(self) -> int:
        """Rows in the cache, -1 while it is empty."""
        return len(self.lengths) if self.is_initialized else -1

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors that hold memory."""
        return [] if self._pool is None else self._pool.tensors

    @property
    def blocks(self) -> int:
        """Blocks in use, those that other caches use too included."""
        return int(np.count_nonzero(np.unique(self._table.ids) >= 0))

    @property
    def used_bytes(self) -> int:
        """Bytes of `blocks`."""
        if self._pool is None or not self._pool.tensors:
            return 0
        return self.blocks * sum(segments[0][:1].nbytes for segments in (self._pool.keys, self._pool.values))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes note of a chunk; the attention that follows commits it.

        Args:
            key_states: `[batch, kv_heads, tokens, head_dim]`.
            value_states: `[batch, kv_heads, tokens, value_dim]`.
            *args: ignored.
            **kwargs: ignored.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_rows(key_states.shape[0])
        self._pending = key_states, value_states
        return key_states, value_states

    def _check_rows(self, rows: int) -> None:
        """Refuses a chunk that cannot follow what the cache has taken in."""
        if self._pending is not None:
            raise UnsupportedError(
                "this cache was left in the middle of a forward (an interrupt, or an attention that is not moacompress's); "
                "start a new one"
            )
        if rows != len(self.lengths):
            raise UnsupportedError(f"the cache holds {len(self.lengths)} rows, the input has {rows}")

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes the number of rows, the dimensions and the device; no memory yet."""
        rows, heads = key_states.shape[0], len(self.rules)
        self.lengths = np.zeros(rows, np.int64)
        self._runs = Runs.none(rows, heads)
        self._use(Pool(key_states, value_states), Table(rows, heads))
        self.is_initialized = True

    def take_pending(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the chunk of the running forward; the caller commits it."""
        assert self._pending is not None
        return self._pending

    def step(self, query: torch.Tensor, *scores: float | torch.Tensor | None) -> torch.Tensor | None:
        """Takes in the running forward's one token of every row, all real, and attends to it: one compiled call.

        Args:
            query: `[rows, heads, 1, head_dim]`, without gradients.
            *scores: scaling, softcap (0: none) and learned logits, as `kernels.dispatch.decode` takes them.

        Returns:
            `[rows, 1, heads, value_dim]`; None, and nothing is done, where there is no kernel for it or no memory yet.
        """
        key, value = self.take_pending()
        out = self._stepped(query, partial(dispatch.step, query, key.detach(), value.detach()), scores)
        if out is not None:
            self._pending = None
        return out

    def step_from(
        self,
        kernel: Callable[..., tuple[torch.Tensor, int]],
        hidden: torch.Tensor,
        *before: Any,
        scores: tuple[float | torch.Tensor | None, ...],
    ) -> torch.Tensor | None:
        """As `step`, by a kernel that makes queries, keys and values too.

        Args:
            kernel: `kernels.dispatch.step_hidden` or `step_layer`.
            hidden: `[rows, 1, inputs]`, without gradients.
            *before: its other arguments, up to the pool's.
            scores: as of `step`.

        Returns:
            What the kernel gives; or None, as `step`.
        """
        if not self.is_initialized:
            return None
        self._check_rows(hidden.shape[0])
        return self._stepped(hidden, partial(kernel, hidden, *before), scores)

    def _stepped(
        self,
        like: torch.Tensor,
        call: Callable[..., tuple[torch.Tensor, int]],
        scores: tuple[float | torch.Tensor | None, ...],
    ) -> torch.Tensor | None:
        if not self._has_memory_for(like) or dispatch.kernel_for(like) != "cpu":
            return None
        with self.lock:
            self.stepping = True
            while True:
                out, wanted = call(*self.state(), *self._rule.columns, self.lag, *scores)
                if not wanted:
                    break
                self.make_room(wanted)
            self.columns += 1
            self.stepping = False
        return out

    def _has_memory_for(self, like: torch.Tensor) -> bool:
        pool = self._pool
        return pool is not None and bool(pool.keys) and pool.keys[0].dtype == like.dtype

    def can_step(self, hidden: torch.Tensor) -> bool:
        """Whether one more token of every row can be taken in by a compiled call: there is memory, and it is as many rows."""
        return self._has_memory_for(hidden) and self._pending is None and hidden.shape[0] == len(self.lengths)

    def arrays(self) -> tuple[Any, ...]:
        """Returns what `state` and `can_step` are made of: they say the same as long as these are the same objects."""
        assert self._pool is not None
        return self._table.ids, self.lengths, self._runs.ends, self._pool.refs, self._pending

    @property
    def lock(self) -> threading.RLock:
        """Of the memory, which forks share; held while `state` is used."""
        assert self._pool is not None
        return self._pool.lock

    def state(self) -> dispatch.CacheState:
        """Returns what a compiled call reads and writes: segments of keys and values, block table, lengths, runs and counts."""
        assert self._pool is not None
        return dispatch.CacheState(self._pool.keys, self._pool.values, *map(torch.from_numpy, self.arrays()[:4]))

    def make_room(self, wanted: int) -> None:
        """Gives a compiled call what it wants: 1 is a wider table, 1 + n are n blocks. The lock is held."""
        assert self._pool is not None
        if wanted == 1:
            self._table.widen(int(self.lengths.max()) // BLOCK + 1)
        else:
            self._pool.grow(wanted - 1)

    def commit(self, chunk: Chunk) -> None:
        """Takes in the chunk of the running forward, and frees every block that no later query sees.

        Args:
            chunk: which of its tokens are real.
        """
        key, value = self.take_pending()
        equals = find_equal_rows(self.lengths, self._table.ids, key, value, chunk)
        if equals is None:
            self._commit(key, value, chunk)
        else:
            unique, inverse = np.unique(equals, return_inverse=True)
            at = torch.from_numpy(unique).to(key.device)
            self.select(unique)
            self._commit(key[at], value[at], chunk.of_rows(unique))
            self.select(inverse)
        self.columns += chunk.columns
        self._pending = None

    def _commit(self, key: torch.Tensor, value: torch.Tensor, chunk: Chunk) -> None:
        before, counts = self.lengths, chunk.counts(len(self.lengths))
        lengths = before + counts
        runs = self._rule.kept(lengths, self._runs, self.lag)
        assert self._pool is not None
        with self._pool.lock:
            if not self._pool.tensors:
                self._pool.reserve(self._needed(lengths, runs, self.columns + chunk.columns))
            self._free(runs)
            self._extend(before, counts, runs)
        self._runs, self.lengths = runs, lengths
        self._write(key, value, before, chunk)

    def blocks_of_rows(self) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """Returns the pool's segments of keys and of values, and the block table: what `kernels.dispatch` reads."""
        assert self._pool is not None
        with self.lock:  # a fork in another thread may be adding a segment
            return [*self._pool.keys], [*self._pool.values], torch.from_numpy(self._table.ids)

    def committed(self, group: Group, heads: Sequence[int]) -> Keys:
        """Returns the cached keys and values of some rows and of KV heads that share a rule.

        Args:
            group: the rows; they have as many tokens each.
            heads: the KV heads.
        """
        assert self._pool is not None
        rows = np.arange(len(self.lengths)) if group.rows is None else group.rows
        n = int(self.lengths[rows[0]])
        # rows can hold more than their rule says (drafts that were rolled back), by different amounts: what all hold
        a, b, c = (int(run[rows][:, heads].max()) for run in self._runs.ends[:3])
        blocks = [*range(a, b), *range(c, -(-n // BLOCK))]
        keys, values = self._pool.gather(self._table.ids[rows[:, None], np.array(heads)[None]][:, :, blocks])
        pieces = [(a * BLOCK, (b - a) * BLOCK), (c * BLOCK, n - c * BLOCK)]
        used = sum(count for _, count in pieces)
        return Keys(keys[:, :, :used], values[:, :, :used], pieces)

    def with_chunk(self, group: Group, heads: Sequence[int], key: torch.Tensor, value: torch.Tensor) -> Keys:
        """Returns the cached keys and values followed by those of the running chunk.

        Args:
            group: rows with as many tokens each, in the cache and in the chunk.
            heads: KV heads that share a rule.
            key: `[rows, heads, tokens, head_dim]`, of these alone.
            value: `[rows, heads, tokens, value_dim]`.
        """
        own = (group.past, group.tokens)
        if not group.past:
            return Keys(key, value, [own])
        held = self.committed(group, heads)
        return Keys(torch.cat((held.keys, key), 2), torch.cat((held.values, value), 2), [*held.pieces, own])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns `(kv_length, kv_offset)` as transformers asks for it."""
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Returns the number of tokens fed so far, padding included."""
        return self.columns

    def get_max_length(self) -> int:
        """Returns -1: the cache grows as long as memory lasts."""
        return -1

    def reset(self) -> None:
        """Empties the layer."""
        if self._finalizer is not None:
            self._finalizer()
        self._clear()

    def select(self, rows: Ints) -> None:
        """Makes the given rows, with repeats, the rows of the cache; they share their blocks until they are written to."""
        if not self.is_initialized:
            return
        assert self._pool is not None
        old = self._table.ids
        with self._pool.lock:
            self._pool.retain(old[rows])
            self._pool.release(old)
        self._table.ids = old.take(rows, axis=0)
        self.lengths = self.lengths[rows]
        self._runs = self._runs.of_rows(rows)

    def check_roll_back(self, counts: Ints) -> None:
        """Refuses to forget so many of the last real tokens of every row, `[rows]`.

        Raises:
            UnsupportedError: what the earlier length needs is gone.
        """
        lengths = self.lengths - counts
        needed, held = self._rule.at(lengths), self._runs
        apart = np.minimum(needed.b, held.c) > np.maximum(needed.a, held.b)  # sinks between those held and the window
        gone = (needed.c < held.c) | ((needed.b > needed.a) & ((needed.a < held.a) | apart))
        if bool((lengths < 0).any() or gone.any()):
            kept = (
                f"the last {LAG} tokens can be rolled back" if self.record_past else "nothing was kept to roll back to"
            )
            raise UnsupportedError(
                f"a compressed cache cannot be rolled back by {int(counts.max())} tokens: evicted keys are gone and {kept}; "
                "draft fewer tokens at a time, or fork() the cache before what is to be undone"
            )

    def roll_back(self, counts: Ints, columns: int) -> None:
        """Forgets the last real tokens of every row.

        Args:
            counts: how many, `[rows]`.
            columns: tokens fed that they were, padding included.

        Raises:
            UnsupportedError: see `check_roll_back`.
        """
        self.check_roll_back(counts)
        lengths, held = self.lengths - counts, self._runs
        end = -(-lengths[:, None] // BLOCK)
        assert self._pool is not None
        with self._pool.lock:
            self._drop(*ragged_ranges(np.maximum(held.a, end), held.b))
            self._drop(*ragged_ranges(np.maximum(held.c, end), held.d))
        self._runs = Runs(np.minimum(held.ends, end))
        self.lengths, self.columns = lengths, self.columns - columns

    def fork(self) -> PlanCacheLayer:
        """Returns a layer with the same content; blocks are shared until one of the two writes to them."""
        if self._pending is not None:
            raise UnsupportedError("a cache cannot be forked in the middle of a forward")
        other = PlanCacheLayer(self.rules, *self._rule.bounds, self.reserve)
        other.record_past = self.record_past
        if not self.is_initialized:
            return other
        assert self._pool is not None
        table = Table(0, len(self.rules))
        table.ids = self._table.ids.copy()
        with self._pool.lock:
            self._pool.retain(table.ids)
        other._use(self._pool, table)
        other.columns, other.lengths, other._runs = self.columns, self.lengths.copy(), Runs(self._runs.ends.copy())
        other.is_initialized = True
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        if self._pending is not None or self.stepping:
            raise UnsupportedError("a cache cannot be pickled in the middle of a forward")
        held = None
        if self._pool is not None:
            with self._pool.lock:  # forks have blocks in it too: what reads these could never free them
                held = (*self._pool.only(self._table.ids), self.columns, self.lengths, self._runs.ends)
        return type(self), (self.rules, *self._rule.bounds, self.reserve), (self.record_past, held)

    def __setstate__(self, state: tuple[bool, tuple[Any, ...] | None]) -> None:
        self.record_past, held = state
        if held is None:
            return
        pool, ids, self.columns, lengths, ends = held
        table = Table(0, len(self.rules))
        # arrays that were read from buffers of the caller's are not ours to write to
        table.ids, self.lengths, self._runs = ids.copy(), lengths.copy(), Runs(ends.copy())
        self._use(pool, table)
        self.is_initialized = True

    def activate_past_recording(self) -> None:
        """Keeps `LAG` tokens longer from now on, so that drafts can be rolled back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens of every row; see `PlanCache.crop`, which knows of padding."""
        count = abs(tokens_to_remove)
        if count and self.is_initialized:
            self.roll_back(np.full(len(self.lengths), count, np.int64), count)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Makes row `beam_idx[i]` row i; rows of the same origin share blocks."""
        self.select(beam_idx.detach().cpu().numpy())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the given rows of the batch, in that order."""
        rows = indices.detach().cpu()
        self.select((torch.nonzero(rows)[:, 0] if rows.dtype == torch.bool else rows).numpy())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch; the copies share blocks."""
        self.select(np.arange(len(self.lengths)).repeat(repeats))

    def offload(self) -> None:
        """Refused: the cache stays on its device."""
        raise UnsupportedError("an offloaded cache is not supported by moacompress; its own cache is small already")

    prefetch = offload

    def _use(self, pool: Pool, table: Table) -> None:
        self._pool, self._table = pool, table
        # a fork that is dropped gives its blocks back to those that live on
        self._finalizer = weakref.finalize(self, _give_back, pool, table)
        self._finalizer.atexit = False

    def _needed(self, lengths: Ints, runs: Runs, columns: int) -> int:
        """Returns the blocks to take memory for: those at these lengths, or the most on the way to the reserved one."""
        left = (self.reserve or 0) - columns
        if left <= 0 or self.record_past:
            return runs.blocks
        total = 0
        for n, count in zip(*np.unique(lengths, return_counts=True), strict=True):
            way = np.arange(max(n, n + left - LONGEST_LOOK), n + left + 1)
            at = self._rule.at(way)
            total += int(count) * int((at.b - at.a + at.d - at.c).sum(axis=1).max())
        return max(total, runs.blocks)

    def _free(self, runs: Runs) -> None:
        """Gives back the blocks that are held and not in `runs`."""
        held = self._runs
        a, b, c = (run.reshape(-1) for run in runs.ends[:3])
        for low, high in ((held.a, held.b), (held.c, np.minimum(runs.c, held.d))):
            owner, number = ragged_ranges(low, high)
            loose = ((number < a[owner]) | (number >= b[owner])) & (number < c[owner])
            self._drop(owner[loose], number[loose])

    def _drop(self, owner: Ints, number: Ints) -> None:
        if not len(owner):
            return
        assert self._pool is not None
        rows, heads = np.divmod(owner, len(self.rules))
        self._pool.release(self._table.ids[rows, heads, number])
        self._table.ids[rows, heads, number] = -1

    def _extend(self, before: Ints, counts: Ints, runs: Runs) -> None:
        """Puts a free block wherever `runs` has one more, and a copy in place of a shared one that will be written to."""
        assert self._pool is not None
        pool, table = self._pool, self._table
        table.widen(int(runs.d.max(initial=0)))
        end = -(-before[:, None] // BLOCK)
        new = [ragged_ranges(np.maximum(low, end), high) for low, high in ((runs.a, runs.b), (runs.c, runs.d))]
        owner, number = (np.concatenate(parts) for parts in zip(*new, strict=True))
        if len(owner):
            rows, heads = np.divmod(owner, len(self.rules))
            table.ids[rows, heads, number] = pool.take(len(owner))
        if not pool.shared:
            return
        open_rows = np.flatnonzero((before % BLOCK != 0) & (counts > 0))
        last = table.ids[open_rows, :, before[open_rows] // BLOCK]
        row, head = np.nonzero((last >= 0) & (pool.refs[np.maximum(last, 0)] > 1))
        if len(row):
            sources = last[row, head]
            copies = pool.take(len(row))
            pool.copy(sources, copies)
            pool.release(sources)
            table.ids[open_rows[row], head, before[open_rows[row]] // BLOCK] = copies

    def _write(self, key: torch.Tensor, value: torch.Tensor, before: Ints, chunk: Chunk) -> None:
        """Copies the real tokens of the chunk that stay into their blocks."""
        assert self._pool is not None
        heads = len(self.rules)
        if chunk.columns == 1:
            rows = np.flatnonzero(self.lengths > before)
            ids = self._table.ids[rows, :, before[rows] // BLOCK].astype(np.int64)
            slots = (ids * BLOCK + (before[rows] % BLOCK)[:, None]).reshape(-1)
            picked = [
                t[:, :, 0] if len(rows) == len(t) else t[torch.from_numpy(rows).to(t.device), :, 0]
                for t in (key, value)
            ]
            self._pool.write(slots, *(t.flatten(0, 1).detach() for t in picked))
            return
        for row in range(len(before)):
            a, b, c = self._runs.ends[:3, row] * BLOCK
            first, end = before[row], self.lengths[row]
            parts = [
                ragged_ranges(np.maximum(a, first), np.minimum(b, end)),
                ragged_ranges(np.maximum(c, first), np.full(heads, end)),
            ]
            head, position = (np.concatenate(part) for part in zip(*parts, strict=True))
            slots = self._table.ids[row][head, position // BLOCK].astype(np.int64) * BLOCK + position % BLOCK
            real = chunk.where(row)
            column = position - first if real is None else real[position - first]
            h, at = (torch.from_numpy(np.ascontiguousarray(t)).to(key.device) for t in (head, column))
            self._pool.write(slots, key[row, h, at].detach(), value[row, h, at].detach())


def _give_back(pool: Pool, table: Table) -> None:
    with pool.lock:
        pool.release(table.ids)
