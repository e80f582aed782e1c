"""Attention over block tables in plain PyTorch: what the compiled kernels must equal, and what runs where they cannot.

A cache is a pool of blocks of 16 tokens, in segments `[blocks, 16, dim]` that count on from each other, and a table
`[rows, kv_heads, width]` that holds the block id of block `j // 16` of every (row, KV head), -1 where there is none. Only
blocks that a query sees are read. Scores, softmax and sums are in float32 at least.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moacompress.core.errors import UnsupportedError
from moacompress.kernels.nonfinite import all_finite, attend_apart
from moacompress.rules.windows import BLOCK, block_runs, segments

TILE_ROWS = 128


def reference_decode(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    table: torch.Tensor,
    lengths: torch.Tensor,
    sink: torch.Tensor,
    alpha: torch.Tensor,
    beta_q: torch.Tensor,
    min_window: int,
    native_window: int,
    scaling: float,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query per row, whose own key and value are in the pool already.

    Args:
        query: `[rows, heads, head_dim]`.
        keys: segments of the pool, each `[blocks, 16, head_dim]`.
        values: as many segments, each `[blocks, 16, value_dim]`.
        table: int32 `[rows, kv_heads, width]`, block ids.
        lengths: int64 `[rows]`, tokens of the row, the current one included; 0 for a row without any.
        sink: int64 `[kv_heads]`, first tokens that are always visible.
        alpha: int64 `[kv_heads]`, fixed part of the window, tokens.
        beta_q: int64 `[kv_heads]`, growth of the window in 1/1024.
        min_window: the plan's smallest window, tokens.
        native_window: the layer's own sliding window in tokens, 0 for none.
        scaling: factor on the scores.
        softcap: bound of the scores by tanh, 0 for none.
        sink_logits: float `[heads]`, learned logits that take probability and give no value, or None.

    Returns:
        `(out, lse)`: `[rows, heads, value_dim]` of the query's dtype, and `[rows, heads]` in float32 at least, the log of the
        softmax's denominator, the learned logit included. A row of length 0 has zeros and -inf. Both are NaN where a visible
        score is NaN or inf, as torch's softmax is; a score of -inf has no weight, and where there is no other, `out` is NaN.

    Raises:
        UnsupportedError: a visible block is not in the table.
    """
    rows, heads, head_dim = query.shape
    kv_heads, width = table.shape[1:]
    n = lengths[:, None]
    rules = (sink, alpha, beta_q, min_window, native_window or None)
    first, sink_end, start = segments(n, *rules)
    a, b, c, d = (torch.as_tensor(x).expand(rows, kv_heads)[:, :, None] for x in block_runs(n, *rules))
    most = int((b - a + d - c).max()) if rows else 0
    index = torch.arange(most, device=query.device)
    blocks = torch.where(index < b - a, a + index, c + index - (b - a))
    present = index < b - a + d - c
    ids = _ids(table, blocks.clamp(0, max(width - 1, 0)), present & (blocks < width), present)
    position = (blocks[..., None] * BLOCK + torch.arange(BLOCK, device=query.device)).flatten(2)
    ends = (x[:, :, None] for x in (first.expand(rows, kv_heads), sink_end, start, n))
    visible = _visible(position, *ends) & present.repeat_interleave(BLOCK, 2)
    k, v = (_pool(pool)[ids].flatten(2, 3).masked_fill(~visible[..., None], 0) for pool in (keys, values))
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, head_dim)
    logits = None if sink_logits is None else sink_logits.view(kv_heads, -1)
    out, lse = _attend(grouped, k, v, visible[:, :, None], scaling, softcap, logits)
    return out.reshape(rows, heads, v.shape[-1]), lse.reshape(rows, heads)


def reference_prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    table: torch.Tensor,
    past: torch.Tensor,
    valid: torch.Tensor,
    sink: torch.Tensor,
    alpha: torch.Tensor,
    beta_q: torch.Tensor,
    min_window: int,
    native_window: int,
    scaling: float,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a chunk of tokens per row over the cache and over the chunk itself.

    Query t of row r stands at position `past[r] + t`.

    Args:
        query: `[rows, heads, tokens, head_dim]`.
        key: `[rows, kv_heads, tokens, head_dim]`, of the chunk.
        value: `[rows, kv_heads, tokens, value_dim]`, of the chunk.
        keys: segments of the pool, or none if no row has a past.
        values: as many segments.
        table: int32 `[rows, kv_heads, width]`, block ids.
        past: int64 `[rows]`, tokens before the chunk.
        valid: int64 `[rows]`, real tokens at the front of the chunk; what follows is not read and yields zeros.
        sink: see `reference_decode`, as all that follows.
        alpha: fixed part of the window.
        beta_q: growth of the window.
        min_window: the plan's smallest window.
        native_window: the layer's own window, 0 for none.
        scaling: factor on the scores.
        softcap: bound of the scores, 0 for none.
        sink_logits: learned logits, or None.

    Returns:
        `(out, lse)`: `[rows, heads, tokens, value_dim]` of the query's dtype and `[rows, heads, tokens]`, -inf past `valid`.

    Raises:
        UnsupportedError: a visible block is not in the table.
    """
    rows, heads, tokens, head_dim = query.shape
    kv_heads, group = key.shape[1], heads // key.shape[1]
    pools = (_pool(keys), key), (_pool(values), value)
    outs, lses = [], []
    for row in range(rows):
        before, real = int(past[row]), int(valid[row])
        for head in range(kv_heads):
            rule = (int(sink[head]), int(alpha[head]), int(beta_q[head]), min_window, native_window or None)
            logits = None if sink_logits is None else sink_logits.view(kv_heads, group)[head]
            parts = [
                (
                    query.new_zeros(group, tokens - real, value.shape[-1]),
                    query.new_full((group, tokens - real), float("-inf"), dtype=_wide(query)),
                )
            ]
            for end in range(real, 0, -TILE_ROWS):  # from the last tile, so that the list is turned round once
                begin = max(0, end - TILE_ROWS)
                n = torch.arange(before + begin + 1, before + end + 1, device=query.device)[:, None]
                position = _seen_together(before + begin + 1, before + end, rule, query.device)
                k, v = (_gather(pool, chunk[row, head], table[row, head], position, before) for pool, chunk in pools)
                first, sink_end, start = (torch.as_tensor(x) for x in segments(n, *rule))
                visible = _visible(position, first, sink_end, start, n)
                q = query[row].view(kv_heads, group, tokens, head_dim)[head, :, begin:end]
                parts.append(
                    _attend_tile(q, k, v, visible, scaling, softcap, None if logits is None else logits[:, None])
                )
            outs.append(torch.cat([out for out, _ in reversed(parts)], 1))
            lses.append(torch.cat([lse for _, lse in reversed(parts)], 1))
    if not outs:
        return query.new_zeros(rows, heads, tokens, value.shape[-1]), query.new_zeros(rows, heads, tokens)
    return (
        torch.stack(outs).view(rows, heads, tokens, value.shape[-1]),
        torch.stack(lses).view(rows, heads, tokens),
    )


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _pool(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    if not parts:
        return torch.empty(0, BLOCK, 0)
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _ids(table: torch.Tensor, blocks: torch.Tensor, known: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Returns the ids of the wanted blocks, 0 for the others.

    Args:
        table: int32 `[..., width]`.
        blocks: int64 `[..., count]`, inside the table.
        known: bool `[..., count]`, wanted and inside the table.
        wanted: bool `[..., count]`.
    """
    if not blocks.numel():
        return blocks
    ids = table.long().gather(-1, blocks) if table.shape[-1] else torch.full_like(blocks, -1)
    ids = torch.where(known, ids, -1)
    if bool(((ids < 0) & wanted).any()):
        raise UnsupportedError("a block that a query sees has no id of the pool in the table")
    return ids.clamp(min=0)


def _seen_together(
    low: int, high: int, rule: tuple[int, int, int, int, int | None], device: torch.device
) -> torch.Tensor:
    """Returns the positions that some of the queries `low - 1 .. high - 1` see, ascending: all bounds grow with n."""
    first, _, start = segments(low, *rule)
    sinks = torch.arange(first, max(first, min(rule[0], start)), device=device)
    return torch.cat([sinks, torch.arange(start, high, device=device)])


def _gather(
    pool: torch.Tensor, chunk: torch.Tensor, table: torch.Tensor, position: torch.Tensor, past: int
) -> torch.Tensor:
    """Returns the rows at these positions: `[positions, dim]`, from the pool before `past` and from the chunk after it."""
    old, new = position[position < past], position[position >= past] - past
    if not len(old):
        return chunk[new]
    blocks = old // BLOCK
    known = blocks < table.shape[-1]
    ids = _ids(table, blocks.clamp(max=max(table.shape[-1] - 1, 0)), known, torch.ones_like(known))
    return torch.cat([pool[ids, old % BLOCK], chunk[new]])


def _visible(
    position: torch.Tensor, first: torch.Tensor, sink_end: torch.Tensor, start: torch.Tensor, n: torch.Tensor
) -> torch.Tensor:
    sinks = (position >= first) & (position < sink_end)
    return sinks | ((position >= start) & (position < n))


def _attend_tile(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    scaling: float,
    softcap: float,
    sink_logits: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_attend` of `[group, rows, head_dim]` queries, of which each may see other keys, `[columns, head_dim]`."""
    scores = (scaling, softcap, sink_logits)
    if all_finite(query, keys, values):
        return _attend(query, keys, values, visible, *scores)
    out, lse = attend_apart(
        lambda q, k, v: _attend(q, k, v, visible, *scores),
        lambda q, k, v: _attend(q, k, v, visible.new_ones(1, k.shape[-2]), *scores),
        query,
        keys,
        values,
        lambda row: visible[row],
    )
    return out, lse


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    scaling: float,
    softcap: float,
    sink_logits: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `[..., group or rows, head_dim]` queries, with the log of the denominator.

    Args:
        query: `[..., rows, head_dim]`.
        keys: `[..., columns, head_dim]`, the dimensions before broadcast.
        values: `[..., columns, value_dim]`.
        visible: bool, broadcasts to `[..., rows, columns]`.
        scaling: factor on the scores.
        softcap: bound of the scores, 0 for none.
        sink_logits: broadcasts to `[..., rows]`, or None.
    """
    wide = _wide(query)
    scores = query.to(wide) @ keys.to(wide).transpose(-1, -2) * scaling
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible, float("-inf"))
    seen = visible.any(-1).expand(scores.shape[:-1])
    if scores.shape[-1]:
        peak = scores.detach().amax(-1).clamp(min=torch.finfo(wide).min)
    else:
        peak = scores.new_full(scores.shape[:-1], torch.finfo(wide).min)
    if sink_logits is not None:
        # a logit of NaN is passed over here: it is in the denominator of the rows that see anything
        peak = torch.fmax(peak, sink_logits.detach().to(wide))
    weights = torch.exp(scores - peak[..., None])
    total = weights.sum(-1)
    if sink_logits is not None:
        total = total + torch.exp(sink_logits.to(wide) - peak) * seen
    total = torch.where(seen, total, 1)
    out = weights @ values.to(wide) / total[..., None]
    lse = torch.where(seen, peak + torch.log(total), float("-inf"))
    return out.to(query.dtype), lse
