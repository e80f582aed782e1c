"""The selected tokens of a layer's cache: what becomes of them in a chunk, and the blocks that they lie in.

They lie in blocks of the layer's pool, of their KV head's formats, under a table of their own: the token in place p is in
`selected.ids[row, head, p // 16]`. Who is in which place follows from scores alone (`rules.selection`); one that takes the
place of another is written over it, and what is evicted from the window is copied there as it was cached.
"""

from __future__ import annotations

import numpy as np
import torch

from moacompress.core.arrays import Ints
from moacompress.kernels.arguments import TransientTokens
from moacompress.kernels.dispatch import backend_on_host
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.selection import EvictionSchedule, competing_tokens
from moacompress.rules.windows import BLOCK
from moacompress.runtime.cache.layer_blocks import LayerBlocks, Past
from moacompress.runtime.cache.pool import Table
from moacompress.runtime.cache.real_tokens import Chunk


def schedule_of_chunk(
    rules: RuleTable,
    before: Ints,
    scores: torch.Tensor,
    chunk: Chunk,
    held: LayerBlocks | None,
    since: Ints | None = None,
) -> EvictionSchedule:
    """Returns what becomes in a chunk of the tokens that gates have selected, and of those that leave windows.

    Their scores come to the host in one copy.

    `before`: real tokens of every row before the chunk, `[rows]`. `scores`: of the chunk's tokens, int16
    `[rows, heads, columns]`. `held`: the layer's blocks, without the chunk; None where there is no cache. `since`: tokens of
    the rows when what is selected in `held` was selected, `[rows]`; `before` by default.
    """
    first, after = (
        rules.tokens_left(n) for n in (before if since is None else since, before + chunk.counts(len(before)))
    )
    tokens = competing_tokens(rules, first, after)
    rows, heads = tokens.rows_and_heads
    cached = tokens.positions < before[rows]
    row, head, at = (part[~cached] for part in (rows, heads, tokens.positions - before[rows]))
    fresh = take_scores(scores, row, head, chunk.columns_of(row, at))
    if held is not None and cached.any():
        found = torch.cat((held.pool.read_scores(_cached_slots(held, tokens.only(cached))), fresh))
    else:
        found = fresh
    known = np.empty(len(rows), np.int64)
    known[np.concatenate((np.flatnonzero(cached), np.flatnonzero(~cached)))] = found.cpu().numpy() if len(rows) else 0
    return backend_on_host().eviction_schedule(tokens, rules, known)


def take_scores(scores: torch.Tensor, rows: Ints, heads: Ints, columns: Ints) -> torch.Tensor:
    """Returns some of the scores of a chunk's tokens, `[rows, heads, columns]`, one of each three numbers, `[tokens]`."""
    at = (rows * scores.shape[1] + heads) * scores.shape[2] + columns
    return scores.reshape(-1)[torch.from_numpy(at).to(scores.device)]


def _cached_slots(held: LayerBlocks, tokens: EvictionSchedule) -> Ints:
    """Returns where tokens lie before the chunk: in windows, or where they were selected; see `Table.slots`."""
    assert held.selected is not None
    (rows, heads), selected, slots = tokens.rows_and_heads, tokens.positions < 0, np.empty(len(tokens.places), np.int64)
    for table, numbers, at in ((held.selected, tokens.places, selected), (held.table, tokens.positions, ~selected)):
        slots[at] = table.slots(rows[at], heads[at], numbers[at])
    return slots


def remember(held: LayerBlocks, lag: int) -> None:
    """Keeps what is selected now: the cache can be rolled back to here while it is `lag` tokens longer at most."""
    assert held.selected is not None
    with held.pool.lock:
        held.past.append(Past(held.lengths.copy(), Table.of(held.selected.ids)))
        held.pool.retain(held.selected.ids)
        while len(held.past) > 1 and (held.past[1].lengths <= held.lengths - lag).all():
            held.pool.release(held.past.pop(0).selected.ids)


def can_go_back(held: LayerBlocks, lengths: Ints) -> bool:
    """Whether it can be found what was selected at some earlier lengths of the rows, `[rows]`.

    It is known of lengths before them, and the tokens that left windows since then are in the windows' blocks still.
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
    """Makes the selected tokens those of earlier lengths of the rows, `[rows]`; see `can_go_back`.

    They are what they were before the last chunk that began no later, and those that left windows since compete again: they are
    in the windows' blocks still.
    """
    assert held.selected is not None
    with held.pool.lock:
        while not (held.past[-1].lengths <= lengths).all():
            held.pool.release(held.past.pop().selected.ids)
        last = held.past[-1]
        held.pool.retain(last.selected.ids)
        held.pool.release(held.selected.ids)
        held.selected.ids = last.selected.ids.copy()
        no_scores = torch.zeros(len(lengths), held.heads, 0, dtype=torch.int16, device=held.pool.device)
        admitted = schedule_of_chunk(held.rules, lengths, no_scores, Chunk(0), held, since=last.lengths).newly_selected
        make_places(held, admitted)
        move_cached(held, admitted, lengths)


def transient_tokens(schedule: EvictionSchedule, before: Ints, held: LayerBlocks | None) -> TransientTokens:
    """Returns the selected tokens that queries of a chunk attend to, those selected before it included.

    `before`: tokens of the rows before it, `[rows]`.
    """
    tokens = schedule.ever_selected
    numbers = tokens.positions - before[tokens.rows_and_heads[0]]
    cached, slots = numbers < 0, -1 - numbers
    if held is not None:
        slots[cached] = _cached_slots(held, tokens.only(cached))
    return TransientTokens(*map(torch.from_numpy, (tokens.begins, slots, tokens.admitted, tokens.evicted)))


def make_places(held: LayerBlocks, admitted: EvictionSchedule) -> None:
    """Takes blocks for tokens that are admitted, and copies of shared ones that will be written to; the pool's lock is held."""
    pool, table = held.pool, held.selected
    assert table is not None
    blocks = admitted.places // BLOCK
    table.widen(int(blocks.max(initial=-1)) + 1)
    where = np.ravel_multi_index((*admitted.rows_and_heads, blocks), table.ids.shape)
    rows, heads, blocks = np.unravel_index(np.unique(where), table.ids.shape)
    ids = table.ids[rows, heads, blocks]
    missing = ids < 0
    ids[missing] = pool.allocate(heads[missing])
    shared = pool.refs[ids] > 1
    if shared.any():
        sources = ids[shared]
        ids[shared] = pool.allocate(heads[shared])
        pool.copy(sources, ids[shared])
        pool.release(sources)
    table.ids[rows, heads, blocks] = ids


def move_cached(held: LayerBlocks, admitted: EvictionSchedule, before: Ints) -> None:
    """Copies tokens that are admitted from windows, whose blocks are there still, to their places.

    `before`: real tokens of every row before the chunk, `[rows]`.
    """
    assert held.selected is not None
    cached = admitted.only(admitted.positions < before[admitted.rows_and_heads[0]])
    if len(cached.places):
        rows, heads = cached.rows_and_heads
        to = held.selected.slots(rows, heads, cached.places)
        held.pool.move(held.table.slots(rows, heads, cached.positions), to, heads)


def write_new(
    held: LayerBlocks,
    admitted: EvictionSchedule,
    key: torch.Tensor,
    value: torch.Tensor,
    scores: torch.Tensor,
    before: Ints,
    chunk: Chunk,
) -> None:
    """Writes tokens that are admitted from the chunk itself to their places.

    `key`: `[rows, kv_heads, columns, head_dim]`. `value`: `[rows, kv_heads, columns, value_dim]`. `scores`:
    `[rows, kv_heads, columns]`. `before`: real tokens of every row before the chunk, `[rows]`.
    """
    assert held.selected is not None
    new = admitted.only(admitted.positions >= before[admitted.rows_and_heads[0]])
    if not len(new.places):
        return
    rows, heads = new.rows_and_heads
    slots, columns = held.selected.slots(rows, heads, new.places), chunk.columns_of(rows, new.positions - before[rows])
    sources = (rows * held.heads + heads) * chunk.columns + columns
    held.pool.write(slots, heads, key.detach(), value.detach(), sources)
    held.pool.write_scores(slots, take_scores(scores, rows, heads, columns))
