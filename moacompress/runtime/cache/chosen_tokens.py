"""The tokens that gates keep in a layer's cache: what becomes of them in a chunk, and the blocks that they lie in.

They lie in blocks of the layer's pool, of their KV head's formats, under a table of their own: the token in place p is in
`chosen.ids[row, head, p // 16]`. Who is in which place follows from scores alone (`rules.selection`); one that takes the place
of another is written over it, and what leaves the window is copied there as it was kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from moacompress.core.arrays import Ints
from moacompress.kernels.arguments import Passing
from moacompress.kernels.dispatch import backend_on_host
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.selection import Turnover
from moacompress.rules.windows import BLOCK, selected
from moacompress.runtime.cache.layer_blocks import LayerBlocks, Past
from moacompress.runtime.cache.pool import Table
from moacompress.runtime.cache.real_tokens import Chunk


@dataclass(frozen=True, eq=False)
class Selection:
    """What gates do in a chunk.

    Attributes:
        scores: of the chunk's tokens, int16 `[rows, heads, columns]`.
        turnovers: of each row and KV head, None for heads whose rule selects nothing.
        sinks: of each head, `[heads]`: the first token to leave its window is the one after them.
    """

    scores: torch.Tensor
    turnovers: Sequence[Sequence[Turnover | None]]
    sinks: Ints

    def of_rows(self, rows: Ints) -> Selection:
        """Returns it for some rows of the batch."""
        at = torch.from_numpy(rows).to(self.scores.device)
        return Selection(self.scores[at], [self.turnovers[row] for row in rows.tolist()], self.sinks)

    def positions(self, head: int, tokens: Ints, made: Turnover) -> Ints:
        """Returns the positions of some of those that leave, by their numbers in the turnover."""
        return np.asarray(self.sinks[head] + made.left + tokens - made.kept_before, np.int64)


def choose(rules: RuleTable, before: Ints, scores: torch.Tensor, chunk: Chunk, held: LayerBlocks | None) -> Selection:
    """Returns what becomes of the tokens that gates keep, and of those that leave windows, in a chunk.

    Args:
        rules: of the KV heads, in numpy.
        before: real tokens of every row before the chunk, `[rows]`.
        scores: of the chunk's tokens, int16 `[rows, heads, columns]`.
        chunk: which of them are real.
        held: the layer's blocks, without the chunk; None where there is no cache.
    """
    return _chosen(rules, before, before, before + chunk.counts(len(before)), scores, chunk, held)


def remember(held: LayerBlocks, lag: int) -> None:
    """Keeps what gates have chosen so far: the cache can be rolled back to here while it is `lag` tokens longer at most."""
    assert held.chosen is not None
    with held.pool.lock:
        held.past.append(Past(held.lengths.copy(), Table.of(held.chosen.ids)))
        held.pool.retain(held.chosen.ids)
        while len(held.past) > 1 and (held.past[1].lengths <= held.lengths - lag).all():
            held.pool.release(held.past.pop(0).chosen.ids)


def can_go_back(held: LayerBlocks, lengths: Ints) -> bool:
    """Whether it can be found what gates had chosen at some earlier lengths of the rows, `[rows]`.

    It is known of lengths before them, and those that left windows since then are in the windows' blocks still.
    """
    known = next((each.lengths for each in reversed(held.past) if (each.lengths <= lengths).all()), None)
    if known is None:
        return False
    first, after = (held.rules.span.sink + held.rules.tokens_left(each) for each in (known, lengths))
    leaving = held.rules.selecting & (after > first)
    return all(
        (held.table.ids[row, head, first[row, head] // BLOCK : (after[row, head] - 1) // BLOCK + 1] >= 0).all()
        for row, head in np.argwhere(leaving)
    )


def go_back(held: LayerBlocks, lengths: Ints) -> None:
    """Makes the tokens that gates keep those of earlier lengths of the rows, `[rows]`; see `can_go_back`.

    They are what they were before the last chunk that began no later, and those that left windows since compete again: they are
    in the windows' blocks still.
    """
    assert held.chosen is not None
    with held.pool.lock:
        while not (held.past[-1].lengths <= lengths).all():
            held.pool.release(held.past.pop().chosen.ids)
        last = held.past[-1]
        held.pool.retain(last.chosen.ids)
        held.pool.release(held.chosen.ids)
        held.chosen.ids = last.chosen.ids.copy()
        none, scores = Chunk(0), torch.zeros(len(lengths), held.heads, 0, dtype=torch.int16)
        coming = arrivals(_chosen(held.rules, last.lengths, lengths, lengths, scores, none, held))
        make_places(held, coming)
        move_cached(held, coming, lengths)


def _chosen(
    rules: RuleTable,
    first_lengths: Ints,
    before: Ints,
    lengths: Ints,
    scores: torch.Tensor,
    chunk: Chunk,
    held: LayerBlocks | None,
) -> Selection:
    """`choose` from some lengths of the rows to others, where the tokens up to `before` are in the cache."""
    first, after = rules.tokens_left(first_lengths), rules.tokens_left(lengths)
    (alphas, betas), sinks, there = rules.select, rules.span.sink, scores.cpu().numpy()
    keeps, let_leave = rules.selecting, backend_on_host().turnover

    def of_head(row: int, head: int) -> Turnover | None:
        if not keeps[head]:
            return None
        left, end = int(first[row, head]), int(after[row, head])
        positions = sinks[head] + np.arange(left, end)
        cached = positions[positions < before[row]]
        columns = chunk.where(row)
        new = positions[len(cached) :] - before[row]
        leaving = there[row, head, new if columns is None else columns[new]].astype(np.int64)
        kept = np.zeros(0, np.int64)
        if held is not None:
            leaving = np.concatenate([held.pool.read_scores(window_slots(held, row, head, cached)), leaving])
            in_use = np.arange(selected(left, int(alphas[head]), int(betas[head])))
            kept = held.pool.read_scores(chosen_slots(held, row, head, in_use))
        return let_leave(leaving, int(alphas[head]), int(betas[head]), kept, left)

    return Selection(scores, [[of_head(row, head) for head in range(len(rules))] for row in range(len(before))], sinks)


def window_slots(held: LayerBlocks, row: int, head: int, positions: Ints) -> Ints:
    """Returns where tokens of the window are, block id * 16 + place in the block, int64 `[tokens]`."""
    return np.asarray(held.table.ids[row, head, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK)


def chosen_slots(held: LayerBlocks, row: int, head: int, places: Ints) -> Ints:
    """Returns where the tokens are that gates keep, by their places; see `window_slots`."""
    assert held.chosen is not None
    return np.asarray(held.chosen.ids[row, head, places // BLOCK].astype(np.int64) * BLOCK + places % BLOCK)


def passing_tokens(selection: Selection, before: Ints, held: LayerBlocks | None) -> Passing:
    """Returns the tokens that gates keep for a while in a chunk, those of before it included.

    Args:
        selection: what gates do in the chunk.
        before: tokens of the rows before it, `[rows]`.
        held: the layer's blocks, without the chunk; None where there is no cache.
    """
    none = np.zeros(0, np.int64)
    slots, entered, gone, counts = [none], [none], [none], [0]
    for row, made_of in enumerate(selection.turnovers):
        for head, made in enumerate(made_of):
            counts.append(0)
            if made is None:
                continue
            ever = made.ever
            old, new = ever[ever < made.kept_before], ever[ever >= made.kept_before]
            positions = selection.positions(head, new, made)
            cached = positions < before[row]
            if held is not None:
                slots += [
                    chosen_slots(held, row, head, made.places[old]),
                    window_slots(held, row, head, positions[cached]),
                ]
            slots.append(before[row] - positions[~cached] - 1)
            entered.append(made.entered[ever])
            gone.append(made.gone[ever])
            counts[-1] = len(ever)
    parts = np.cumsum(counts), *(np.concatenate(part) for part in (slots, entered, gone))
    return Passing(*(torch.from_numpy(np.ascontiguousarray(part, np.int64)) for part in parts))


class Arrivals(NamedTuple):
    """Tokens of one row and KV head that come to be kept, each `[tokens]`.

    Attributes:
        row: of the batch.
        head: the KV head.
        positions: where they are in the row.
        places: where they are kept.
    """

    row: int
    head: int
    positions: Ints
    places: Ints


def arrivals(selection: Selection) -> list[Arrivals]:
    """Returns who comes to be kept in a chunk and is kept at its end."""
    found = []
    for row, made_of in enumerate(selection.turnovers):
        for head, made in enumerate(made_of):
            if made is not None and len(new := made.new):
                found.append(Arrivals(row, head, selection.positions(head, new, made), made.places[new]))
    return found


def make_places(held: LayerBlocks, coming: Sequence[Arrivals]) -> None:
    """Takes blocks for those who come, and copies of shared ones that will be written to; the pool's lock is held."""
    pool, table = held.pool, held.chosen
    assert table is not None
    table.widen(max((int(each.places.max()) // BLOCK + 1 for each in coming), default=0))
    for row, head, _, places in coming:
        blocks = np.unique(places // BLOCK)
        ids = table.ids[row, head, blocks]
        missing = blocks[ids < 0]
        if len(missing):
            table.ids[row, head, missing] = pool.take(np.full(len(missing), head))
        if not pool.shared:
            continue
        shared = blocks[(ids >= 0) & (pool.refs[np.maximum(ids, 0)] > 1)]
        if len(shared):
            sources = table.ids[row, head, shared]
            copies = pool.take(np.full(len(shared), head))
            pool.copy(sources, copies)
            pool.release(sources)
            table.ids[row, head, shared] = copies


def move_cached(held: LayerBlocks, coming: Sequence[Arrivals], before: Ints) -> None:
    """Copies those who come from windows, whose blocks are there still, to their places.

    Args:
        held: the layer's blocks.
        coming: who comes.
        before: real tokens of every row before the chunk, `[rows]`.
    """
    parts = []
    for row, head, positions, places in coming:
        cached = positions < before[row]
        if cached.any():
            slots = window_slots(held, row, head, positions[cached]), chosen_slots(held, row, head, places[cached])
            parts.append((*slots, np.full(int(cached.sum()), head)))
    if parts:
        held.pool.move(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def write_new(
    held: LayerBlocks,
    coming: Sequence[Arrivals],
    key: torch.Tensor,
    value: torch.Tensor,
    scores: torch.Tensor,
    before: Ints,
    chunk: Chunk,
) -> None:
    """Writes those who come from the chunk itself to their places.

    Args:
        held: the layer's blocks.
        coming: who comes.
        key: `[rows, kv_heads, columns, head_dim]`.
        value: `[rows, kv_heads, columns, value_dim]`.
        scores: `[rows, kv_heads, columns]`.
        before: real tokens of every row before the chunk, `[rows]`.
        chunk: which of its tokens are real.
    """
    parts = []
    for row, head, positions, places in coming:
        new = positions >= before[row]
        if new.any():
            columns, real = positions[new] - before[row], chunk.where(row)
            at = columns if real is None else real[columns]
            parts.append(
                (chosen_slots(held, row, head, places[new]), np.full(len(at), row), np.full(len(at), head), at)
            )
    if not parts:
        return
    slots, rows, heads, columns = (np.concatenate(part) for part in zip(*parts, strict=True))
    at = tuple(torch.from_numpy(numbers).to(key.device) for numbers in (rows, heads, columns))
    held.pool.write(slots, heads, key[at].detach(), value[at].detach())
    held.pool.write_scores(slots, scores[at].cpu().numpy())
