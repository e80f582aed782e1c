"""Attention under a rule, in plain PyTorch, one tile of query rows at a time.

No tensor grows with queries x keys: a tile reads only the keys that some row of it can see, and the rows of a tile are
chosen so that its scores stay near `TILE_SCORES` numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moacompress.kernels.nonfinite import all_finite, attend_apart
from moacompress.rules.rule import Rule
from moacompress.rules.windows import segments, window

TILE_SCORES = 1 << 22
MAX_TILE = 128
COPY_GAP = 64
"""Two column ranges closer than this are read as one range with a mask: cheaper than copying them together."""


@dataclass(frozen=True)
class Keys:
    """Keys and values of KV heads that share a rule, sorted by position.

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
    scaling: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain attention of grouped queries.

    Args:
        query: `[batch, kv_heads, group, rows, head_dim]`.
        keys: `[batch, kv_heads, columns, head_dim]`.
        values: `[batch, kv_heads, columns, value_dim]`.
        visible: bool `[rows, columns]`, or None where every row sees every column.
        scaling: factor on the scores.
        softcap: bound of the scores by tanh (Gemma 2), or None.
        sink_logits: learned logit of each query head that takes probability and gives no value (gpt-oss),
            `[kv_heads, group]`, or None.

    Returns:
        `[batch, kv_heads, group, rows, value_dim]`. Scores and softmax are in float32 at least.
    """
    if softcap is None and sink_logits is None and (visible is None or visible.ndim == 2):
        return _fused(query, keys, values, visible, scaling)
    return _by_scores(query, keys, values, visible, scaling, softcap, sink_logits)


def _by_scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """`attend` by a softmax of all scores."""
    batch, kv_heads, group, rows, head_dim = query.shape
    columns = keys.shape[2]
    scores = torch.matmul(query.reshape(batch, kv_heads, group * rows, head_dim), keys.transpose(2, 3))
    scores = scores.view(batch, kv_heads, group, rows, columns)
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    scores = scores * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if sink_logits is not None:
        column = sink_logits.to(scores.dtype)[None, :, :, None, None].expand(batch, -1, -1, rows, 1)
        scores = torch.cat((scores, column), -1)
    weights = scores.softmax(-1)[..., :columns].to(values.dtype)
    out = torch.matmul(weights.view(batch, kv_heads, group * rows, columns), values)
    return out.view(batch, kv_heads, group, rows, values.shape[-1])


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
    query: torch.Tensor,
    keys: Keys,
    n: int,
    rule: Rule,
    min_window: int,
    native_window: int | None,
    scaling: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the last rows of a sequence under one rule.

    Args:
        query: `[batch, kv_heads, group, rows, head_dim]`; row r is the query at position `n - rows + r`.
        keys: at least every key that one of the rows sees.
        n: tokens in the sequence, these rows included.
        rule: the rule that all these KV heads have.
        min_window: the plan's smallest window, tokens.
        native_window: the layer's own sliding window in tokens, or None.
        scaling: factor on the scores.
        softcap: see `attend`.
        sink_logits: see `attend`.

    Returns:
        `[batch, kv_heads, group, rows, value_dim]`. Numbers that are not finite reach the rows that see them as they do in
        torch's softmax, and no others.
    """

    def together(query: torch.Tensor, keys: Keys) -> torch.Tensor:
        return _in_tiles(query, keys, n, rule, min_window, native_window, scaling, softcap, sink_logits)

    def sees(row: int) -> torch.Tensor:
        length = positions.new_tensor([[n - query.shape[3] + row + 1]])
        return visible_keys(length, positions, rule, min_window, native_window)[0]

    out = together(query, keys)
    # what is not finite shows in the output, or in gradients; or it makes zeros: torch's fused attention of scores of -inf
    suspect = ~out.isfinite().all(-1) | ~out.any(-1)
    if not (out.requires_grad or bool(suspect.any())) or all_finite(query, keys.keys, keys.values):
        return out
    positions = keys.positions()
    return attend_apart(
        lambda q, k, v: (together(q, Keys(k, v, keys.pieces)),),
        lambda q, k, v: (_by_scores(q, k, v, None, scaling, softcap, sink_logits),),
        query,
        keys.keys,
        keys.values,
        sees,
    )[0]


def _in_tiles(
    query: torch.Tensor,
    keys: Keys,
    n: int,
    rule: Rule,
    min_window: int,
    native_window: int | None,
    scaling: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """`sparse_attention` of finite numbers."""
    batch, kv_heads, group, rows, _ = query.shape
    if _is_plain_causal(keys, n, rows, rule, native_window, softcap, sink_logits):
        flat = query.reshape(batch, kv_heads * group, rows, -1)
        out = F.scaled_dot_product_attention(
            flat, keys.keys, keys.values, is_causal=rows > 1, scale=scaling, enable_gqa=group > 1
        )
        return out.view(batch, kv_heads, group, rows, -1)
    positions = keys.positions()
    widest = int(window(n, rule.alpha, rule.beta_q, min_window)) + rule.sink
    tile = max(16, min(MAX_TILE, TILE_SCORES // max(1, batch * kv_heads * group * min(n, widest + MAX_TILE))))
    outs = []
    for begin in range(0, rows, tile):
        end = min(begin + tile, rows)
        low, high = n - rows + begin + 1, n - rows + end
        first, _, start = segments(low, rule.sink, rule.alpha, rule.beta_q, min_window, native_window)
        _, sink_end, _ = segments(high, rule.sink, rule.alpha, rule.beta_q, min_window, native_window)
        picks = _merge(keys.columns(first, min(sink_end, start)), keys.columns(start, high))
        k, v, p = (_pick(tensor, picks, dim) for tensor, dim in ((keys.keys, 2), (keys.values, 2), (positions, 0)))
        lengths = torch.arange(low, high + 1, device=query.device)[:, None]
        visible = visible_keys(lengths, p, rule, min_window, native_window)
        outs.append(attend(query[:, :, :, begin:end], k, v, visible, scaling, softcap, sink_logits))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 3)


def visible_keys(
    lengths: torch.Tensor, positions: torch.Tensor, rule: Rule, min_window: int, native_window: int | None
) -> torch.Tensor:
    """Returns which keys each query sees.

    Args:
        lengths: int64 `[rows, 1]`, position of the query + 1.
        positions: int64 `[columns]`, positions of the keys.
        rule: the KV head's rule.
        min_window: the plan's smallest window, tokens.
        native_window: the layer's own sliding window in tokens, or None.

    Returns:
        bool `[rows, columns]`.
    """
    first, sink_end, start = segments(lengths, rule.sink, rule.alpha, rule.beta_q, min_window, native_window)
    visible: torch.Tensor = (positions >= first) & (positions < sink_end)
    return visible.logical_or_((positions >= start) & (positions < lengths))


def _is_plain_causal(
    keys: Keys,
    n: int,
    rows: int,
    rule: Rule,
    native_window: int | None,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
) -> bool:
    """Whether this is what torch's own causal attention computes: everything visible, no cache before the rows."""
    everything = rule.is_full and (native_window is None or native_window >= n)
    return everything and rows == n == keys.keys.shape[2] and softcap is None and sink_logits is None


def _merge(sinks: tuple[int, int], recent: tuple[int, int]) -> list[tuple[int, int]]:
    if sinks[0] >= sinks[1]:
        return [recent]
    if recent[0] - sinks[1] <= COPY_GAP:
        return [(sinks[0], recent[1])]
    return [sinks, recent]


def _pick(tensor: torch.Tensor, picks: list[tuple[int, int]], dim: int) -> torch.Tensor:
    parts = [tensor.narrow(dim, a, b - a) for a, b in picks]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
