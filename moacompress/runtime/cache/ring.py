"""The windows of a layer's cache as rings of blocks, while single tokens are taken in on its device.

A table of rings does not change while rows grow (`kernels.arguments.RingState`): a block that no query sees any more is written
over by the one that takes its place. All blocks that will be asked for up to some length are taken before the first step, so
the host does nothing in a step but count. What the layer holds then follows from how many tokens there are, by the arithmetic
of `block_runs`: `Ring.leave` makes the block table again, and whoever wants to know what is held asks for that first. So forks,
beams, drafts that are rolled back and chunks are what they are without rings, and no data is moved.
"""

from __future__ import annotations

import numpy as np
import torch

from moacompress.core.arrays import Bools, Ints, ragged_ranges
from moacompress.kernels.arguments import RingState, Scores
from moacompress.kernels.backend import Backend
from moacompress.kernels.bound import BoundReuse, BoundRing
from moacompress.rules.windows import BLOCK, whole_blocks
from moacompress.runtime.cache.block_runs import BEGIN, END, kept_runs
from moacompress.runtime.cache.layer_blocks import LayerBlocks
from moacompress.runtime.cache.pool import Ids, reserved

AHEAD = 256
"""Tokens that rings are made for at least, beyond those that there are."""
LONGEST_LOOK = 4096
"""Lengths before the last one at which the largest window is looked for; windows do not shrink."""


class Ring:
    """A layer's blocks in rings.

    `held`: the layer's blocks; while the ring is used its tables name all blocks of the ring, in their places there.

    Attributes:
        taken: how many tokens were taken in, int64 `[rows]`.
    """

    def __init__(self, held: LayerBlocks, until: int, lag: int, sizes: Ints, backend: Backend) -> None:
        self._held, self._lag, self._sizes = held, lag, sizes
        self._until = until
        self.taken = np.zeros(len(held.lengths), np.int64)
        with torch.inference_mode(False):  # what is made in inference mode cannot be written to outside
            self._steps = self._bound(backend)

    def _bound(self, backend: Backend) -> BoundRing:
        """Takes the blocks that will be asked for, and returns the steps that write into them."""
        held, until, sizes = self._held, self._until, self._sizes
        pool, rules, device = held.pool, held.rules, held.pool.device
        with pool.lock:
            held.table.ids = _ring_table(held, until, sizes)
            if held.selected is not None:
                _take_selected(held, until)
            layout = pool.layout
            table, lengths = (torch.from_numpy(each.copy()).to(device) for each in (held.table.ids, held.lengths))
            state = RingState([*pool.keys], [*pool.values], [], table, sizes, lengths)
            if held.selected is not None:
                selected = torch.from_numpy(held.selected.ids.copy()).to(device)
                counts = torch.from_numpy(np.ascontiguousarray(rules.selected(held.lengths))).to(device)
                state = state._replace(scores=pool.value_sets()[0], selected=selected, counts=counts)
            elif any(layout.shared_values):
                state = state._replace(shared_values=pool.value_sets())
        kv_dims = layout.kinds[0][0].dim, layout.value_dim
        return backend.bind_ring(state, rules=rules, kv_dims=kv_dims, dtype=layout.dtype)

    @property
    def is_full(self) -> bool:
        """Whether no more tokens can be taken in."""
        return int(self.lengths.max(initial=0)) >= self._until

    @property
    def lengths(self) -> Ints:
        """Tokens of the rows, int64 `[rows]`."""
        return np.asarray(self._held.lengths + self.taken)

    def step(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scores: Scores,
        gate_scores: torch.Tensor | None,
        real: Bools | None,
    ) -> torch.Tensor:
        """Takes in one more token of every row and attends to it; see `BoundRing.step`.

        Args:
            query: `[rows, heads, 1, head_dim]`.
            key: `[rows, kv_heads, 1, head_dim]`.
            value: `[rows, kv_heads, 1, value_dim]`.
            scores: how scores are made.
            gate_scores: of the tokens, int16 `[rows, kv_heads]`; None where no rule selects.
            real: which tokens are, bool `[rows]`; None where all are.
        """
        counts = np.ones(len(self.taken), np.int64) if real is None else real.astype(np.int64)
        taken = None if real is None else torch.from_numpy(counts).to(query.device)
        out = self._steps.step(query, key, value, scores=scores, gate_scores=gate_scores, taken=taken)
        self.taken = self.taken + counts
        return out

    def count_steps(self, steps: int) -> None:
        """Counts tokens that the device has taken in of every row by itself."""
        self.taken = self.taken + steps

    def reuse(self, head_map: Ints, value_sets: Ints) -> BoundReuse:
        """Returns the steps of a layer that shares the attention; after a first step.

        `head_map`: KV head whose attention each of its KV heads has, int64 `[kv_heads]`.
        """
        layout = self._held.pool.layout
        of_heads = zip(layout.of_head[head_map].tolist(), value_sets.tolist(), strict=True)
        formats = np.array([layout.shared_values[kind][value_set].code for kind, value_set in of_heads], np.int64)
        return self._steps.reuse(head_map=head_map, value_sets=value_sets, value_formats=formats)

    def leave(self) -> None:
        """Makes the layer's block tables what they are without rings, and gives back the blocks that wait for tokens."""
        held = self._held
        lengths = self.lengths
        with held.pool.lock:
            runs = kept_runs(held.rules, lengths, held.runs, self._lag)
            rings, ids = held.table.ids, np.full((*runs.shape[2:], int(runs[:, END].max(initial=0))), -1, np.int32)
            for begin, end in runs:
                rows, heads, number = _owned(begin, end)
                ids[rows, heads, number] = rings[rows, heads, _slots(number, heads, self._sizes)]
            if held.pool.shared:
                held.pool.retain(ids)
                held.pool.release(rings)
            else:
                held.pool.release(np.setdiff1d(rings, ids).astype(np.int32))
            held.table.ids, held.runs = ids, runs
            if held.selected is not None:
                kept = whole_blocks(held.rules.selected(lengths)) // BLOCK
                beyond = np.arange(held.selected.ids.shape[-1]) >= kept[..., None]
                held.pool.release(held.selected.ids[beyond])
                held.selected.ids = np.where(beyond, -1, held.selected.ids).astype(np.int32)
            held.move_to(lengths)


def ring_sizes(held: LayerBlocks, until: int, lag: int) -> Ints | None:
    """Returns how many blocks the sinks take of each KV head, and how many the largest window up to some length takes.

    Returns:
        int64 `[2, kv_heads]`; None where blocks lie as they do in no ring.
    """
    sinks = whole_blocks(held.rules.span.sink) // BLOCK
    begin, end = held.runs[0]
    if ((end > begin) & (end > sinks)).any():
        return None
    first = int(held.lengths.min(initial=until))
    lengths = np.arange(max(first, until - LONGEST_LOOK), until + 1)
    begin = held.rules.block_runs(np.maximum(lengths - lag, 0))[-1, BEGIN]
    end = held.rules.block_runs(lengths)[-1, END]
    most = (end - np.maximum(begin, sinks)).max(axis=0)
    now = (held.runs[-1, END] - np.maximum(held.runs[-1, BEGIN], sinks)).max(axis=0, initial=1)
    return np.stack((sinks, np.maximum(most, now)))


def _ring_table(held: LayerBlocks, until: int, sizes: Ints) -> Ids:
    """Returns the table of rings: the blocks that are held, and new ones for those that tokens up to `until` lie in."""
    found = np.full((len(held.lengths), held.heads, int(sizes.sum(axis=0).max())), -1, np.int32)
    for begin, end in held.runs:
        rows, heads, number = _owned(begin, end)
        found[rows, heads, _slots(number, heads, sizes)] = held.table.ids[rows, heads, number]
    begin = np.broadcast_to(-(-held.lengths[:, None] // BLOCK), found.shape[:2])
    end = np.minimum(-(-until // BLOCK), np.maximum(begin, sizes[0]) + sizes[1])
    rows, heads, number = _owned(begin, end)
    slots = _slots(number, heads, sizes)
    missing = found[rows, heads, slots] < 0
    found[rows[missing], heads[missing], slots[missing]] = held.pool.allocate(heads[missing])
    return found


def _written(held: LayerBlocks, until: int, sizes: Ints) -> Bools:
    """Returns into which blocks of rings tokens up to a length are written, bool `[rows, heads, blocks of the table]`."""
    found = np.zeros((len(held.lengths), held.heads, int(sizes.sum(axis=0).max())), np.bool_)
    begin = np.broadcast_to(held.lengths[:, None] // BLOCK, found.shape[:2])
    end = np.minimum(-(-until // BLOCK), np.maximum(begin, sizes[0]) + sizes[1])
    rows, heads, number = _owned(begin, end)
    found[rows, heads, _slots(number, heads, sizes)] = True
    return found


def _own_what_is_written(held: LayerBlocks, until: int, sizes: Ints, copies: bool) -> bool:
    """Puts copies in place of blocks that other rows or caches have too, where steps up to a length will write.

    `held`: the layer's blocks; the pool's lock is held. `until`: the length. `copies`: whether to; otherwise nothing is done.

    Returns:
        Whether the blocks are its own now.
    """
    pool = held.pool
    if not pool.shared:
        return True
    written = _written(held, until, sizes)
    there: list[tuple[Ids, Ints, Ints, Ints]] = []
    for begin, end in held.runs:
        rows, heads, number = _owned(begin, end)
        chosen = written[rows, heads, _slots(number, heads, sizes)]
        there.append((held.table.ids, rows[chosen], heads[chosen], number[chosen]))
    if held.selected is not None:
        rows, heads, number = np.nonzero(held.selected.ids >= 0)
        there.append((held.selected.ids, rows, heads, number))
    for ids, rows, heads, number in there:
        sources = ids[rows, heads, number]
        shared = pool.refs[sources] > 1
        if not shared.any():
            continue
        if not copies:
            return False
        sources, at = sources[shared], (rows[shared], heads[shared], number[shared])
        ids[at] = pool.allocate(at[1])
        pool.copy(sources, ids[at])
        pool.release(sources)
    return True


def _take_selected(held: LayerBlocks, until: int) -> None:
    """Takes blocks for all tokens that gates will select up to some length."""
    assert held.selected is not None
    wanted = whole_blocks(held.rules.selected(np.array([until])))[0] // BLOCK
    held.selected.widen(int(wanted.max(initial=1)))
    ids = held.selected.ids
    rows, heads, number = np.nonzero((ids < 0) & (np.arange(ids.shape[-1]) < wanted[:, None]))
    ids[rows, heads, number] = held.pool.allocate(heads)


def _owned(begin: Ints, end: Ints) -> tuple[Ints, Ints, Ints]:
    """Returns row, KV head and number of the blocks in the runs of every row and KV head, `[rows, heads]` each."""
    owner, number = ragged_ranges(begin, end)
    return *np.divmod(owner, begin.shape[1]), number


def _slots(number: Ints, heads: Ints, sizes: Ints) -> Ints:
    """Returns where blocks lie in the tables of KV heads, int64 `[blocks]`."""
    sinks, ring = sizes[:, heads]
    return np.where(number < sinks, number, sinks + (number - sinks) % ring)


def ring_for(held: LayerBlocks, reserve: int | None, lag: int, backend: Backend, *, copies: bool = True) -> Ring | None:
    """Returns rings of a layer's blocks, for as many tokens as were reserved or a few more.

    `reserve`: tokens of a row that there may be in the end, or None. `copies`: whether blocks that are shared, and would be
    written over, are copied once.

    Returns:
        None where such blocks are not to be copied, or blocks lie as they do in no ring.
    """
    longest = int(held.lengths.max(initial=0))
    until = max(reserved(reserve, longest), longest + AHEAD)
    with held.pool.lock:
        sizes = ring_sizes(held, until, lag)
        if sizes is None or not _own_what_is_written(held, until, sizes, copies):
            return None
    return Ring(held, until, lag, sizes, backend)
