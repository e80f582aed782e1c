"""Taking in a chunk: what no later query sees is given back, blocks are taken, and the tokens that stay are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from moacompress.core.arrays import Ints, ragged_ranges
from moacompress.rules.selection import EvictionSchedule
from moacompress.rules.windows import BLOCK, RUNS, whole_blocks
from moacompress.runtime.cache.block_runs import BEGIN, END, kept_runs, run_sizes
from moacompress.runtime.cache.layer_blocks import LayerBlocks
from moacompress.runtime.cache.pool import Ids
from moacompress.runtime.cache.real_tokens import Chunk
from moacompress.runtime.cache.selected_tokens import (
    make_places,
    move_cached,
    schedule_of_chunk,
    take_scores,
    write_new,
)

LONGEST_LOOK = 4096
"""Steps over which the largest cache on the way to a reserved length is looked for."""


def commit(
    held: LayerBlocks,
    key: torch.Tensor,
    value: torch.Tensor,
    chunk: Chunk,
    *,
    scores: torch.Tensor | None = None,
    schedule: EvictionSchedule | None = None,
    lag: int = 0,
    to_come: int = 0,
) -> None:
    """Takes in a chunk; rows that are the same are taken in once.

    Args:
        held: the layer's blocks.
        key: `[rows, kv_heads, tokens, head_dim]`.
        value: `[rows, kv_heads, tokens, value_dim]`.
        chunk: which of its tokens are real.
        scores: of its tokens, int16 `[rows, kv_heads, tokens]`, where rules select.
        schedule: what becomes of the selected tokens in it, where that is known already.
        lag: tokens that are kept longer for rolling back.
        to_come: tokens of a row after the chunk for which the first memory is taken, too.
    """
    tables = [table.ids for table in held.tables]
    given = (key, value) if scores is None else (key, value, scores)
    equals = _equal_rows(held.lengths, tables, given, chunk)
    if equals is not None:
        unique, inverse = np.unique(equals, return_inverse=True)
        held.select(unique)
        key, value, *rest = (tensor[torch.from_numpy(unique).to(tensor.device)] for tensor in given)
        few = None if schedule is None else schedule.of_rows(unique)
        scores = rest[0] if rest else None
        commit(held, key, value, chunk.of_rows(unique), scores=scores, schedule=few, lag=lag, to_come=to_come)
        held.select(inverse)
        return
    before, counts = held.lengths, chunk.counts(len(held.lengths))
    lengths = before + counts
    runs = kept_runs(held.rules, lengths, held.runs, lag)
    if schedule is None and scores is not None:
        schedule = schedule_of_chunk(held.rules, before, scores, chunk, held)
    admitted = None if schedule is None else schedule.newly_selected
    with held.pool.lock:
        if not held.pool.tensors:
            held.pool.reserve(_needed(held, lengths, runs, 0 if lag else to_come))
        if admitted is not None:
            make_places(held, admitted)
            move_cached(held, admitted, before)
        _free(held, runs)
        _extend(held, before, counts, runs)
    held.runs = runs
    held.move_to(lengths)
    slots, rows, heads, columns, sources = _placed(held, before, chunk)
    held.pool.write(slots, heads, key.detach(), value.detach(), sources)
    if admitted is not None and scores is not None:
        write_new(held, admitted, key, value, scores, before, chunk)
        scored = np.array(held.pool.layout.scored)[held.pool.layout.of_head][heads]
        found = take_scores(scores, rows[scored], heads[scored], columns[scored])
        held.pool.write_scores(slots[scored], found)


def _equal_rows(lengths: Ints, tables: Sequence[Ids], given: Sequence[torch.Tensor], chunk: Chunk) -> Ints | None:
    """Finds rows that are the same, to the bit, before and in a chunk: the repeated ones of beams and return sequences.

    That their tokens are the same would not be enough (adapters of single rows), so keys and values are compared.

    `lengths`: real tokens of every row before the chunk, `[rows]`. `tables`: the block tables, each
    `[rows, heads, logical blocks]`. `given`: of the chunk, keys, values and what else counts, `[rows, heads, tokens, ...]`;
    keys are looked at first.

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
    groups = np.unique(last, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.argsort(groups, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        for at, row in enumerate(members):
            for other in members[:at]:
                if equals[other] == other and same(row, other):
                    equals[row] = other
                    break
    return equals if bool((equals != np.arange(rows)).any()) else None


def _needed(held: LayerBlocks, lengths: Ints, runs: Ints, to_come: int) -> Ints:
    """Returns the blocks to take memory for, of each kind: those at these lengths, or the most on the way to the reserved one.

    Returns:
        int64 `[kinds]`.
    """
    layout = held.pool.layout
    of_kind = np.arange(len(layout.kinds))[:, None] == layout.of_head
    selected = whole_blocks(held.rules.selected(lengths)) // BLOCK
    now: Ints = (of_kind * (run_sizes(runs) + selected).sum(axis=0)).sum(axis=1)
    if to_come <= 0:
        return now
    total = np.zeros_like(now)
    for n, count in zip(*np.unique(lengths, return_counts=True), strict=True):
        way = np.arange(max(n, n + to_come - LONGEST_LOOK), n + to_come + 1)
        total += int(count) * (held.rules.slots(way) // BLOCK @ of_kind.T).max(axis=0)
    return np.maximum(total, now)


def _free(held: LayerBlocks, runs: Ints) -> None:
    """Gives back the blocks that are held and not in `runs`."""
    flat = runs.reshape(RUNS, 2, -1)
    for begin, end in held.runs:
        owner, number = ragged_ranges(begin, np.minimum(runs[-1, BEGIN], end))
        stays = np.zeros(len(owner), np.bool_)
        for low, high in flat[:, :, owner]:
            stays |= (number >= low) & (number < high)
        held.drop(owner[~stays], number[~stays])


def _extend(held: LayerBlocks, before: Ints, counts: Ints, runs: Ints) -> None:
    """Puts a free block wherever `runs` has one more, and a copy in place of a shared one that will be written to."""
    pool, table = held.pool, held.table
    table.widen(int(runs[-1, END].max(initial=0)))
    end = -(-before[:, None] // BLOCK)
    new = [ragged_ranges(np.maximum(low, end), high) for low, high in runs]
    owner, number = (np.concatenate(parts) for parts in zip(*new, strict=True))
    if len(owner):
        rows, heads = np.divmod(owner, held.heads)
        table.ids[rows, heads, number] = pool.allocate(heads)
    if not pool.shared:
        return
    open_rows = np.flatnonzero((before % BLOCK != 0) & (counts > 0))
    last = table.ids[open_rows, :, before[open_rows] // BLOCK]
    row, head = np.nonzero((last >= 0) & (pool.refs[np.maximum(last, 0)] > 1))
    if len(row):
        sources = last[row, head]
        copies = pool.allocate(head)
        pool.copy(sources, copies)
        pool.release(sources)
        table.ids[open_rows[row], head, before[open_rows[row]] // BLOCK] = copies


class _Placed(NamedTuple):
    """The real tokens of a chunk that stay.

    Attributes:
        slots: where each goes to, block id * 16 + place in the block, `[tokens]`.
        rows: of the batch, `[tokens]`.
        heads: of the chunk's KV heads, `[tokens]`.
        columns: of the chunk, `[tokens]`.
        sources: the three as one number, see `Pool.write`.
    """

    slots: Ints
    rows: Ints
    heads: Ints
    columns: Ints
    sources: Ints


def write_shared_values(
    held: LayerBlocks, value: torch.Tensor, before: Ints, chunk: Chunk, head_map: Ints, value_sets: Ints
) -> None:
    """Copies the values of a layer that shares the keys beside those of the same chunk, which is taken in already.

    `value`: `[rows, heads, tokens, value_dim]`. `before`: tokens of the rows before the chunk, `[rows]`.
    """
    slots, _, heads, _, sources = _placed(held, before, chunk, head_map)
    held.pool.write_shared_values(slots, head_map[heads], value_sets[heads], value.detach(), sources)


def _placed(held: LayerBlocks, before: Ints, chunk: Chunk, head_map: Ints | None = None) -> _Placed:
    """Returns the real tokens of a chunk that stay; with a `head_map` those of a layer that shares the blocks' keys."""
    ids, runs = held.table.ids, held.runs
    if head_map is not None:
        ids, runs = ids[:, head_map], runs[:, :, :, head_map]
    first, end, count = before[:, None], held.lengths[:, None], ids.shape[1]
    ranges = [ragged_ranges(np.maximum(begin * BLOCK, first), np.minimum(stop * BLOCK, end)) for begin, stop in runs]
    owner, position = (np.concatenate(part) for part in zip(*ranges, strict=True))
    rows, heads = np.divmod(owner, count)
    columns = chunk.columns_of(rows, position - before[rows])
    slots = ids[rows, heads, position // BLOCK].astype(np.int64) * BLOCK + position % BLOCK
    return _Placed(slots, rows, heads, columns, (rows * count + heads) * chunk.columns + columns)
