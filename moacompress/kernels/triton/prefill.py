"""What a launch of `prefill_kernels` is given; worked out on the host, from what rows have and from rules."""

from __future__ import annotations

import numpy as np
import torch

from moacompress.core.arrays import Ints
from moacompress.kernels.arguments import CacheView, Scores, TransientTokens, dense_rows
from moacompress.kernels.kv_parts import KVPart
from moacompress.kernels.reference.codes import decode, encode, rotated
from moacompress.kernels.triton import prefill_kernels
from moacompress.kernels.triton.cards import card_of
from moacompress.kernels.triton.decode import turned_back
from moacompress.kernels.triton.tile_sizes import prefill_constants
from moacompress.kernels.triton.work_lists import block_places, check_table, first_of, kinds_of, to_device
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import BLOCK, visible_intervals


def attend_chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    cache: CacheView,
    past: torch.Tensor,
    valid: torch.Tensor,
    rules: RuleTable,
    scores: Scores,
    transient: TransientTokens | None,
    wide: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Backend.prefill`; without gradients. `wide` says whether products are in float32.

    Raises:
        UnsupportedError: a visible block is not in the table, or not in the pool in its formats; or a format is not known.
    """
    (rows, heads, tokens, head_dim), device = query.shape, query.device
    kv_heads, value_dim = key.shape[1], value.shape[3]
    group = heads // kv_heads
    kinds = kinds_of(rules, head_dim, value_dim, query.dtype)
    check_table(cache, chunk_runs(rules, past.numpy()), kinds.of_head, (past * (valid > 0)).numpy())
    coded = rules.format_codes != 0
    rotates = bool(coded[1].any())
    out = query.new_empty(rows, heads, tokens, value_dim, dtype=torch.float32 if rotates else query.dtype)
    lse = query.new_empty(rows, heads, tokens, dtype=torch.float32)
    if not out.numel():
        return out.to(query.dtype), lse
    cached = bool((past > 0).any())
    own = [np.nonzero(kinds.number == number)[0] for number in range(len(kinds.pairs))]
    lists = transient or (past[:0],) * 4  # which nobody reads
    numbers = (cache.table.numpy(), past.numpy(), valid.numpy(), rules.columns, *(part.numpy() for part in lists), *own)
    table, befores, valids, columns, begins, slots, admitted, evicted, *members = to_device(numbers, device)
    plain, key, value = map(dense_rows, (query, key, value))
    turned = rotated(plain).to(query.dtype) if coded[0].any() else plain
    for kv_parts, launched in zip(kinds.pairs, members, strict=True):
        tiles, constants = prefill_constants(
            group,
            head_dim,
            value_dim,
            (kv_parts[0].bits, kv_parts[1].bits),
            softcap=bool(scores.softcap),
            logits=scores.sink_logits is not None,
            cached=cached,
            transient=transient is not None,
            wide=wide,
            item_size=query.element_size(),
            card=card_of(device),
        )
        asking = turned if kv_parts[0].bits else plain
        chunk = [_as_kept(*pair, launched, wide) for pair in zip(kv_parts, (key, value), strict=True)]
        pools, places = [], []
        for kv_part, segments, stand_in in zip(kv_parts, (cache.keys, cache.values), chunk, strict=True):
            first = first_of(segments, kv_part) if cached else None
            pools.append(stand_in if first is None else first)
            places.append(befores if first is None else block_places(segments, first))
        grid = (-(-tokens // int(constants["TOKENS"])), len(launched), rows)
        suspect = torch.zeros(rows * kv_heads * grid[0], dtype=torch.int32, device=device)
        for careful in (False, True):
            prefill_kernels.attend_chunk[grid](
                asking,
                *pools,
                *places,
                table,
                *chunk,
                befores,
                valids,
                columns,
                launched,
                begins,
                slots,
                admitted,
                evicted,
                lse if scores.sink_logits is None else scores.sink_logits.contiguous(),
                out,
                lse,
                suspect,
                float(scores.scaling),
                float(scores.softcap),
                kv_heads,
                cache.table.shape[2],
                tokens,
                *(asking.stride()[:3] + chunk[0].stride()[:3] + chunk[1].stride()[:3]),
                **constants,
                CAREFUL=careful,
                **tiles.options,
            )
    return (turned_back(out, coded[1], group).to(query.dtype) if rotates else out), lse


def chunk_runs(rules: RuleTable, past: Ints) -> Ints:
    """Returns the cached blocks that queries of chunks see: begins and ends of sinks and windows, `[2, 2, rows, kv_heads]`."""
    before = past[:, None]
    (first, _), (start, _) = visible_intervals(before + 1, rules.span)
    sink_end = np.maximum(first, np.minimum(np.minimum(rules.span.sink, start), before))  # those of later queries too
    runs = ((first, sink_end), (start, before))
    return np.stack(
        [np.stack(np.broadcast_arrays(low // BLOCK, np.where(high > low, -(-high // BLOCK), 0))) for low, high in runs]
    )


def _as_kept(kv_part: KVPart, chunk: torch.Tensor, heads: torch.Tensor, wide: bool) -> torch.Tensor:
    """Returns what a chunk's vectors of some KV heads are kept as, in the rotated basis; native ones of all as they are."""
    if not kv_part.bits:
        return chunk
    found = decode(encode(chunk.index_select(1, heads), kv_part.bits))
    return found if wide else found.to(chunk.dtype)
