"""A decode step's attention, as it is launched."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from moacompress.core.arrays import Ints
from moacompress.kernels.arguments import CacheView, Scores
from moacompress.kernels.reference.codes import rotated
from moacompress.kernels.triton import decode_kernels
from moacompress.kernels.triton.cards import card_of
from moacompress.kernels.triton.tile_sizes import MERGE_WARPS, TileSizes, merge_constants, split_constants
from moacompress.kernels.triton.work_lists import Memory, memory_of, to_device, work_lists
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable


class Stretches(NamedTuple):
    """What programs attend to; see `decode_kernels.split`."""

    work: torch.Tensor
    table: torch.Tensor
    rings: torch.Tensor
    lengths: torch.Tensor
    columns: torch.Tensor
    kv_heads: int
    chunk: int


def attend_step(
    query: torch.Tensor,
    cache: CacheView,
    lengths: Ints,
    rules: RuleTable,
    scores: Scores,
    *,
    wide: bool,
    selected: tuple[CacheView, Ints] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query a row, and the log of its denominator; see `Backend.decode`.

    `wide` says whether products are in float32. `selected` are the selected tokens, and how many each row and KV head has,
    int64 `[rows, kv_heads]`: they are attended to as all of a row with one KV head, and are more parts of the same sum.

    Raises:
        UnsupportedError: a visible block is not in the table; a format is not known.
    """
    rows, heads, head_dim = query.shape
    kv_heads, value_dim = cache.table.shape[1], cache.size_of_values
    group, device = heads // kv_heads, query.device
    plan = work_lists(cache, lengths, rules, query.dtype, head_dim, value_dim, selected)
    coded = rules.format_codes != 0
    rotates = bool(coded[1].any())
    out = query.new_empty(rows, heads, value_dim, dtype=torch.float32 if rotates else query.dtype)
    lse = query.new_empty(rows, heads, dtype=torch.float32)
    if not rows:
        return out.to(query.dtype), lse
    held = [(cache.table.numpy(), lengths, rules.columns)]
    if selected is not None:
        held.append((selected[0].table.flatten(0, 1).numpy(), selected[1], RuleTable.of([Rule.FULL], 1).columns))
    works = [work for each in plan.launches for work in (each.work, each.selected)][:: 1 if selected else 2]
    numbers = to_device((plan.begins, *(part for each in held for part in each), *works), device)
    begins, of_held, of_work = numbers[0], numbers[1 : 1 + 3 * len(held)], iter(numbers[1 + 3 * len(held) :])
    partial = out.new_empty(int(plan.begins[-1]), group, value_dim, dtype=torch.float32)
    partial_lse = partial.new_empty(partial.shape[:2])
    plain = query.contiguous()
    turned = rotated(plain).to(query.dtype) if coded[0].any() else plain
    for launch in plan.launches:
        key, value = launch.kv_parts
        tiles, constants = split_constants(
            group,
            head_dim,
            value_dim,
            (key.bits, value.bits),
            softcap=bool(scores.softcap),
            wide=wide,
            item_size=query.element_size(),
            card=card_of(device),
        )
        for number in range(len(held)):
            work = next(of_work)
            if not len(work):
                continue
            table, row_lengths, columns = of_held[3 * number : 3 * number + 3]
            over = Stretches(work, table, table, row_lengths, columns, 1 if number else kv_heads, launch.chunk)
            memory = memory_of(cache.keys, key), memory_of(cache.values, value)
            asked = turned if key.bits else plain
            launch_split(asked, memory, over, None, (partial, partial_lse), scores, (tiles, constants))
    add_up((partial, partial_lse), begins, scores, out, lse)
    return (turned_back(out, coded[1], group).to(query.dtype) if rotates else out), lse


def launch_split(
    query: torch.Tensor,
    memory: tuple[Memory, Memory],
    over: Stretches,
    kept: torch.Tensor | None,
    partial: tuple[torch.Tensor, torch.Tensor],
    scores: Scores,
    compiled_for: tuple[TileSizes, dict[str, int | bool]],
) -> None:
    """Attends to stretches of blocks, by `decode_kernels.split`.

    `memory` is that of keys and of values. `kept` are scores that are kept or read, None where none are. `partial` is written
    to. `compiled_for` is what `split_constants` returns.
    """
    tiles, constants = compiled_for
    (keys, key_places), (values, value_places) = memory
    decode_kernels.split[(len(over.work),)](
        query,
        keys,
        values,
        key_places,
        value_places,
        over.table,
        over.rings,
        over.lengths,
        over.columns,
        over.work,
        partial[0] if kept is None else kept,
        *partial,
        float(scores.scaling),
        float(scores.softcap),
        over.kv_heads,
        over.table.shape[-1],
        over.chunk,
        **constants,
        **tiles.options,
    )


def add_up(
    partial: tuple[torch.Tensor, torch.Tensor],
    begins: torch.Tensor,
    scores: Scores,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Adds up the parts of a step's attention, by `decode_kernels.merge`.

    `partial` are outputs and logs of denominators. `out`, `[rows, heads, value_dim]`, and `lse`, float32 `[rows, heads]`, are
    written to.
    """
    rows, heads, value_dim = out.shape
    group = partial[0].shape[1]
    decode_kernels.merge[(rows * heads,)](
        *partial,
        lse if scores.sink_logits is None else scores.sink_logits.contiguous(),
        begins,
        out,
        lse,
        heads // group,
        **merge_constants(group, value_dim, logits=scores.sink_logits is not None),
        num_warps=MERGE_WARPS,
    )


def turned_back(out: torch.Tensor, coded: np.ndarray, group: int) -> torch.Tensor:
    """Returns outputs `[rows, heads, ..., value_dim]` that are in the rotated basis where values have codes, in the plain one.

    `coded` says of each KV head whether its values have codes; it has `group` query heads.
    """
    back = torch.from_numpy(coded.repeat(group)).to(out.device)
    return torch.where(back.view(-1, *[1] * (out.ndim - 2)), rotated(out), out)
