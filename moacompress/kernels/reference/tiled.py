"""Attention of queries in a row over the keys that a span makes visible, in plain PyTorch, one tile of query rows at a time.

No tensor grows with queries x keys: a tile reads only the keys that some row of it can see, and the rows of a tile are
chosen so that its scores stay near `TILE_SCORES` numbers. Scores, softmax and sums are in float32 at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moacompress.kernels.arguments import Scores
from moacompress.kernels.reference.nonfinite import attend_as_seen
from moacompress.rules.windows import BETA_ONE, Span, visible_intervals, window

TILE_SCORES = 1 << 22
MAX_TILE = 128
COPY_GAP = 64
"""Two column ranges closer than this are read as one range with a mask: cheaper than copying them together."""


@dataclass(frozen=True)
class Keys:
    """Keys and values of KV heads that share a span, sorted by position.

    Attributes:
        keys: `[batch, kv_heads, columns, head_dim]`.
        values: `[batch, kv_heads, columns, value_dim]`.
        pieces: `(first position, count)` of each contiguous run of columns, ascending.
    """

    keys: torch.Tensor
    values: torch.Tensor
    pieces: Sequence[tuple[int, int]]

    def columns(self, low: int, high: int) -> tuple[int, int]:
        """Returns the columns `[a, b)` that hold the positions within `[low, high)`."""
        a, b = (sum(min(max(edge - start, 0), count) for start, count in self.pieces) for edge in (low, high))
        return a, max(a, b)

    def positions(self) -> torch.Tensor:
        """Returns the position of every column, int64 `[columns]`."""
        device = self.keys.device
        return torch.cat([torch.arange(start, start + count, device=device) for start, count in self.pieces])


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor | None,
    scores: Scores,
    *,
    with_lse: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Plain attention of grouped queries, `[batch, kv_heads, group, rows, head_dim]`.

    Keys are `[batch, kv_heads, columns, head_dim]`. Which of them a row sees is bool `[rows, columns]`, None for all; learned
    logits are `[kv_heads, group]`.

    Returns:
        `[batch, kv_heads, group, rows, value_dim]` of the query's dtype; then, `with_lse`, the log of the softmax's
        denominator, `[batch, kv_heads, group, rows]` in float32 at least.
    """
    if not (scores.softcap or with_lse) and scores.sink_logits is None:
        return (_fused(query, keys, values, visible, scores.scaling),)
    return _by_scores(query, keys, values, visible, scores)[: 1 + with_lse]


def _by_scores(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor | None, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` by a softmax of all scores, with the log of its denominator."""
    batch, kv_heads, group, rows, head_dim = query.shape
    columns, wide = keys.shape[2], torch.promote_types(query.dtype, torch.float32)
    flat = query.reshape(batch, kv_heads, group * rows, head_dim).to(wide)
    found = (flat @ keys.to(wide).transpose(2, 3)).view(batch, kv_heads, group, rows, columns) * scores.scaling
    if scores.softcap:
        found = torch.tanh(found / scores.softcap) * scores.softcap
    if visible is not None:
        found = found.masked_fill(~visible, float("-inf"))
    peak = found.detach().amax(-1).clamp(min=torch.finfo(wide).min)
    logits = None if scores.sink_logits is None else scores.sink_logits.to(wide)[None, :, :, None]
    if logits is not None:
        # a logit of NaN is passed over here: it is in the denominator
        peak = torch.fmax(peak, logits.detach())
    weights = torch.exp(found - peak[..., None])
    total = weights.sum(-1)
    if logits is not None:
        total = total + torch.exp(logits - peak)
    out = torch.matmul(weights.view(batch, kv_heads, group * rows, columns), values.to(wide))
    out = out.view(batch, kv_heads, group, rows, values.shape[-1]) / total[..., None]
    return out.to(query.dtype), peak + torch.log(total)


def _fused(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """`attend` without its extras, by torch's fused attention, which is two to three times as fast."""
    batch, kv_heads, group, rows, head_dim = query.shape
    mask = None
    if visible is not None:
        mask = query.new_zeros(visible.shape).masked_fill_(~visible, float("-inf"))
    # KV heads join the batch, so that the query heads of a group share keys and values without a copy
    k, v = (t.flatten(0, 1)[:, None].expand(-1, group, -1, -1) for t in (keys, values))
    out = F.scaled_dot_product_attention(
        query.reshape(batch * kv_heads, group, rows, head_dim), k, v, attn_mask=mask, scale=scaling
    )
    return out.view(batch, kv_heads, group, rows, values.shape[-1])


def sparse_attention(
    query: torch.Tensor, keys: Keys, n: int, span: Span, scores: Scores, *, with_lse: bool = False
) -> tuple[torch.Tensor, ...]:
    """Attention of the last rows of a sequence of `n` tokens under one span; row r is the query at position `n - rows + r`.

    Shapes are those of `attend`; every key that one of the rows sees is there. Numbers that are not finite reach the rows that
    see them as they do in torch's softmax, and no others.
    """

    def sees(row: int) -> torch.Tensor:
        positions = keys.positions()
        length = positions.new_tensor([[n - query.shape[3] + row + 1]])
        return visible_keys(length, positions, span)[0]

    return attend_as_seen(
        lambda q, k, v: _in_tiles(q, Keys(k, v, keys.pieces), n, span, scores, with_lse),
        lambda q, k, v: _by_scores(q, k, v, None, scores)[: 1 + with_lse],
        query,
        keys.keys,
        keys.values,
        sees,
    )


def _in_tiles(
    query: torch.Tensor, keys: Keys, n: int, span: Span, scores: Scores, with_lse: bool
) -> tuple[torch.Tensor, ...]:
    """`sparse_attention` of finite numbers."""
    batch, kv_heads, group, rows, _ = query.shape
    if _is_plain_causal(keys, n, rows, span, scores) and not with_lse:
        flat = query.reshape(batch, kv_heads * group, rows, -1)
        out = F.scaled_dot_product_attention(
            flat, keys.keys, keys.values, is_causal=rows > 1, scale=scores.scaling, enable_gqa=group > 1
        )
        return (out.view(batch, kv_heads, group, rows, -1),)
    positions = keys.positions()
    widest = int(window(n, span.alpha, span.beta_q, span.min_window)) + span.sink
    tile = max(16, min(MAX_TILE, TILE_SCORES // max(1, batch * kv_heads * group * min(n, widest + MAX_TILE))))
    tiles = []
    for begin in range(0, rows, tile):
        end = min(begin + tile, rows)
        low, high = n - rows + begin + 1, n - rows + end
        # all bounds grow with n: the first row's are the lowest, and the last row's sinks end last
        (first, _), (start, _) = visible_intervals(low, span)
        (_, sink_end), _ = visible_intervals(high, span)
        picks = _merge(keys.columns(first, min(sink_end, start)), keys.columns(start, high))
        k, v, p = (_pick(tensor, picks, dim) for tensor, dim in ((keys.keys, 2), (keys.values, 2), (positions, 0)))
        lengths = torch.arange(low, high + 1, device=query.device)[:, None]
        visible = visible_keys(lengths, p, span)
        tiles.append(attend(query[:, :, :, begin:end], k, v, visible, scores, with_lse=with_lse))
    return tiles[0] if len(tiles) == 1 else tuple(torch.cat(parts, 3) for parts in zip(*tiles, strict=True))


def visible_keys(lengths: torch.Tensor, positions: torch.Tensor, span: Span) -> torch.Tensor:
    """Returns which keys each query sees, bool `[rows, columns]`.

    `lengths` are positions of the queries + 1, int64 `[rows, 1]`, and `positions` those of the keys, int64 `[columns]`.
    """
    (first, sink_end), (start, end) = visible_intervals(lengths, span)
    visible: torch.Tensor = (positions >= first) & (positions < sink_end)
    return visible.logical_or_((positions >= start) & (positions < end))


def _is_plain_causal(keys: Keys, n: int, rows: int, span: Span, scores: Scores) -> bool:
    """Whether this is what torch's own causal attention computes: everything visible, no cache before the rows."""
    everything = span.beta_q >= BETA_ONE and (not span.native_window or span.native_window >= n)
    plain = not scores.softcap and scores.sink_logits is None
    return everything and rows == n == keys.keys.shape[2] and plain


def _merge(sinks: tuple[int, int], recent: tuple[int, int]) -> list[tuple[int, int]]:
    if sinks[0] >= sinks[1]:
        return [recent]
    if recent[0] - sinks[1] <= COPY_GAP:
        return [(sinks[0], recent[1])]
    return [sinks, recent]


def _pick(tensor: torch.Tensor, picks: list[tuple[int, int]], dim: int) -> torch.Tensor:
    parts = [tensor.narrow(dim, a, b - a) for a, b in picks]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
