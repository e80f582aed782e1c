"""What the kernels write to a cache, as they are launched: new tokens, and copies of those that gates select."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moacompress.core.arrays import Bools, Ints
from moacompress.core.errors import UnsupportedError
from moacompress.kernels.arguments import CacheView, SelectedView, dense_rows
from moacompress.kernels.kv_parts import KVPart
from moacompress.kernels.triton import append_kernels, select_kernels
from moacompress.kernels.triton.tile_sizes import (
    APPEND_WARPS,
    SELECT_WARPS,
    append_constants,
    move_constants,
    select_constants,
)
from moacompress.kernels.triton.work_lists import Memory, block_places, lie_in, memory_of, to_device
from moacompress.rules.rule import SCORE_BYTES
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import BLOCK, selected, whole_blocks


def append(
    kv_parts: tuple[KVPart | None, KVPart],
    key: torch.Tensor | None,
    value: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    where: tuple[Ints, Ints],
) -> None:
    """Writes tokens of a chunk into blocks, in one launch; see `Backend.append`.

    `where` has which tokens, and their slots, int64 `[tokens]` each; there are some.

    Raises:
        UnsupportedError: a block is not in the pool in these formats.
    """
    sources, slots = where
    _, kv_heads, columns, _ = value.shape
    vectors, memory = [], []
    for kv_part, given, segments in zip(kv_parts, (key, value), (keys, values), strict=True):
        if kv_part is None or given is None:
            continue
        _check(lie_in(segments, kv_part, slots // BLOCK))
        vectors.append(dense_rows(given.detach() if kv_part.bits else given.detach().to(kv_part.dtype)))
        memory.append(memory_of(segments, kv_part))
    (work,) = to_device((np.stack((sources, slots)),), value.device)
    # without keys the values stand for them, and are not read
    append_kernels.append[(len(slots),)](
        vectors[0],
        vectors[-1],
        *by_kind(memory[0], memory[-1]),
        work,
        len(slots),
        kv_heads,
        columns,
        *vectors[0].stride()[:3],
        *vectors[-1].stride()[:3],
        **append_constants(*kv_parts),
        num_warps=APPEND_WARPS,
        enable_fp_fusion=False,
    )


def move(
    kv_parts: Sequence[tuple[KVPart, KVPart]],
    cache: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor]],
    heads: Ints,
    slots: Ints,
    to: Ints,
) -> None:
    """Copies tokens with their scores, in one launch for every pair of formats; see `Backend.move_selected`.

    `kv_parts` are those of each KV head, `cache` the segments of keys, values and scores; `heads`, `slots` and `to` say of each
    token its KV head, where it is and where it goes to, int64 `[tokens]`.

    Raises:
        UnsupportedError: a block is not in the pool in these formats.
    """
    for pair in sorted(set(kv_parts)):
        mine = np.array([pair == other for other in kv_parts])[heads]
        if not mine.any():
            continue
        places = np.stack((slots[mine], to[mine]))
        memory = _selected_memory(pair, cache, places // BLOCK)
        (work,) = to_device((places,), cache[0][0].device)
        count = int(mine.sum())
        select_kernels.move[(count,)](*by_kind(*memory), work, count, **move_constants(*pair), num_warps=SELECT_WARPS)


def select_next(
    kv_parts: Sequence[tuple[KVPart, KVPart]], cache: CacheView, kept: SelectedView, lengths: Ints, rules: RuleTable
) -> None:
    """Lets those tokens compete that leave windows when the next token comes; one launch for every pair of formats.

    `kv_parts` are those of each KV head; `lengths` are the tokens of the rows, int64 `[rows]`.

    Raises:
        UnsupportedError: a block of a token that competes, or of one that is selected, is not in the tables.
    """
    segments = cache.keys, cache.values, kept.scores
    left, after = (rules.tokens_left(n) for n in (lengths, lengths + 1))
    counts = selected(after, *rules.select)
    competes = (after > left) & (counts > 0)
    if not competes.any():
        return
    rows, kv_heads = competes.shape
    numbers = (cache.table.numpy(), kept.table.numpy(), lengths, rules.columns)
    windows, places, row_lengths, columns = to_device(numbers, cache.keys[0].device)
    for pair in sorted(set(kv_parts)):
        mine = np.flatnonzero([pair == other and bool(rules.selecting[at]) for at, other in enumerate(kv_parts)])
        row, at = np.nonzero(competes[:, mine])
        if not len(row):
            continue
        head = mine[at]
        ids = _ids_of(cache.table.numpy(), row, head, rules.span.sink[head] + left[row, head], 1)
        others = _ids_of(kept.table.numpy(), row, head, np.zeros_like(row), whole_blocks(counts[row, head]))
        memory = _selected_memory(pair, segments, np.concatenate((ids, others)))
        (of_pair,) = to_device((mine,), cache.keys[0].device)
        select_kernels.select[(rows * len(mine),)](
            *by_kind(*memory),
            windows,
            windows,
            places,
            places,
            row_lengths,
            row_lengths,
            columns,
            of_pair,
            len(mine),
            kv_heads,
            windows.shape[-1],
            places.shape[-1],
            **select_constants(*pair),
            num_warps=SELECT_WARPS,
        )


def _ids_of(table: np.ndarray, rows: Ints, heads: Ints, first: Ints, count: Ints | int) -> Ints:
    """Returns the ids of blocks in which tokens lie, `count` from the number `first` on of each row and KV head; -1 beyond."""
    begin, end = first // BLOCK, -(-(first + count) // BLOCK)
    sizes = end - begin
    owner = np.repeat(np.arange(len(rows)), sizes)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes) + begin[owner]
    inside = number < table.shape[-1]
    found = np.full(len(owner), -1, np.int64)
    found[inside] = table[rows[owner][inside], heads[owner][inside], number[inside]]
    return found


def score_memory(scores: Sequence[torch.Tensor]) -> Memory:
    """Returns where the scores of a pool's tokens lie; some segment has them."""
    base = next(segment for segment in scores if segment.numel())
    return base.view(torch.int16), block_places(scores, base)


def _selected_memory(
    kv_parts: tuple[KVPart, KVPart], cache: Sequence[Sequence[torch.Tensor]], ids: Ints
) -> tuple[Memory, Memory, Memory]:
    """Returns the memory of keys, values and scores of one pair of formats, in which all blocks `ids` are."""
    keys, values, scores = cache
    for kv_part, segments in zip(kv_parts, (keys, values), strict=True):
        _check(lie_in(segments, kv_part, ids))
    ends = np.cumsum([len(segment) for segment in scores])
    there = np.array([segment.shape[1] == BLOCK * SCORE_BYTES for segment in scores])
    if len(scores) != len(keys) or not there[np.searchsorted(ends, ids, "right")].all():
        raise UnsupportedError("a block of a selected token has no scores of its tokens")
    return memory_of(keys, kv_parts[0]), memory_of(values, kv_parts[1]), score_memory(scores)


def by_kind(*memory: Memory) -> list[torch.Tensor]:
    """Returns where blocks are counted from of all sides, then where they lie."""
    return [*(base for base, _ in memory), *(places for _, places in memory)]


def _check(inside: Bools) -> None:
    if not inside.all():
        raise UnsupportedError(
            "a block that is written to or read has no id of the pool in the table, or is of other formats"
        )
