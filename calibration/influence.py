"""Attention whose backward pass also says what every rule would cost: pure functions on tensors.

For one layer with output `O`, cotangent `dO` and probabilities `P`, let `G = dO V^T` and `D_i = dO_i . O_i`. A KV head
under rule r renormalises the probabilities of the keys that row i still sees, so its output moves along `dO_i` by

    d_i(r) = dO_i . (O_i under r - O_i) = (K_i - e_i D_i) / (A_i + e_i),  K_i = sum of P (G - D),  A_i = sum of P

with both sums over the visible keys, and `e_i` the probability of a learned sink logit (0 for models without one).
This is exact, not a first-order expansion: the expansion is in how the loss depends on O. The query heads of a KV group
are added before anything is squared. Queries are worked on in tiles of rows, so nothing of size N x N is ever held, and
one pair of cumulative sums over the keys serves all rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from moacompress.plan import Rule, segments

TILE = 64
"""Query rows worked on at a time."""


@dataclass(frozen=True)
class AttentionSpec:
    """How a layer attends.

    Attributes:
        scaling: factor of the logits.
        native_window: the model's own sliding window in tokens, or None.
        softcap: logits are `softcap * tanh(logits / softcap)`, or None.
    """

    scaling: float
    native_window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class RuleTable:
    """Rules as int64 columns `[rules]`, so that the windows of many rows and rules are found at once."""

    sink: Tensor
    alpha: Tensor
    beta_q: Tensor
    min_window: int

    @staticmethod
    def of(rules: Sequence[Rule], min_window: int, device: torch.device | str = "cpu") -> RuleTable:
        """Returns the table of `rules`, in their order."""
        columns = torch.tensor(
            [(rule.sink, rule.alpha, rule.beta_q) for rule in rules], dtype=torch.int64, device=device
        )
        sink, alpha, beta_q = columns.unbind(1)
        return RuleTable(sink, alpha, beta_q, min_window)

    def segments(self, n: Tensor, native_window: int | None) -> tuple[Tensor, Tensor]:
        """Returns `(sink_end, start)`, each `[len(n), rules]`: row `n - 1` sees the keys before, and from there on."""
        _, sink_end, start = segments(n[:, None], self.sink, self.alpha, self.beta_q, self.min_window, native_window)
        return sink_end, start


class Collector(Protocol):
    """What receives the deltas of every tile of rows."""

    def add(self, rows: Tensor, deltas: Tensor) -> None:
        """Takes the deltas `d_i(r)`, `[kv_heads, len(rows), rules]`, of the query positions `rows`."""


class InfluenceSums:
    """The two statistics of one layer and one backward pass, in float64.

    Attributes:
        squares: `sum_i d_i^2`, `[kv_heads, rules]`.
        total: `sum_i d_i`, `[kv_heads, rules]`; its square is the per-sample estimator.
    """

    def __init__(self, kv_heads: int, rules: int, device: torch.device | str = "cpu") -> None:
        self.squares = torch.zeros(kv_heads, rules, dtype=torch.float64, device=device)
        self.total = torch.zeros_like(self.squares)

    def reset(self) -> None:
        """Forgets everything, for the next backward pass."""
        self.squares.zero_()
        self.total.zero_()

    def add(self, rows: Tensor, deltas: Tensor) -> None:
        """Adds a tile of deltas `[kv_heads, rows, rules]`."""
        deltas = deltas.double()
        self.total += deltas.sum(1)
        self.squares += deltas.square_().sum(1)


class _Tile(NamedTuple):
    """Query rows `rows` and the keys `[low, high)`, which hold all that any of them sees.

    Keys are kept newest first: column 0 of a tile is key `high - 1`, so that plain cumulative sums run outward from the
    diagonal. Differences of sums from the far end would lose a window that holds 1e-6 of the probability.
    """

    rows: Tensor
    first_row: int
    last_row: int
    low: int

    @property
    def high(self) -> int:
        return self.last_row + 1

    def columns(self, n: int) -> slice:
        """Returns where its keys are among all `n` keys, newest first."""
        return slice(n - self.high, n - self.low)


def _tiles(rows: Tensor, native_window: int | None, size: int) -> list[_Tile]:
    tiles = []
    for part in rows.split(size):
        first, last = (int(end) for end in part[[0, -1]].tolist())
        tiles.append(_Tile(part, first, last, 0 if native_window is None else max(0, first + 1 - native_window)))
    return tiles


def _mask_logits(logits: Tensor, tile: _Tile, native_window: int | None) -> None:
    """Sets to -inf what the dense model does not see, in place; only the two edges of the band are touched.

    Args:
        logits: `[..., rows, keys of the tile]`.
        tile: which rows and keys.
        native_window: the model's own sliding window, or None.
    """
    keys = torch.arange(tile.high - 1, tile.low - 1, -1, device=logits.device)
    rows = tile.rows[:, None]
    future = tile.last_row - tile.first_row
    logits[..., :future].masked_fill_(keys[:future] > rows, -torch.inf)
    if native_window is not None:
        past = max(0, tile.last_row - native_window + 1 - tile.low)
        logits[..., len(keys) - past :].masked_fill_(keys[len(keys) - past :] <= rows - native_window, -torch.inf)


def _probabilities(
    query: Tensor, keys: Tensor, tile: _Tile, spec: AttentionSpec, sink_logit: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the attention probabilities of a tile.

    Args:
        query: `[kv_heads, group * rows, head_dim]`, scaled.
        keys: `[kv_heads, keys of the tile, head_dim]`, newest first.
        tile: which rows and keys.
        spec: how the layer attends.
        sink_logit: learned sink logit of each query head, `[kv_heads, group, 1, 1]`, or None.

    Returns:
        Probabilities `[kv_heads, group, rows, keys]`; that of the learned sink `[kv_heads, group, rows, 1]` or None;
        the derivative of the soft cap, shaped as the probabilities, or None.
    """
    logits = torch.bmm(query, keys.transpose(1, 2)).view(len(keys), -1, len(tile.rows), keys.shape[1])
    slope = None
    if spec.softcap is not None:
        logits.div_(spec.softcap).tanh_()
        slope = 1 - logits.square()
        logits.mul_(spec.softcap)
    _mask_logits(logits, tile, spec.native_window)
    if sink_logit is None:
        return torch.softmax(logits, -1), None, slope
    total = torch.logaddexp(torch.logsumexp(logits, -1, keepdim=True), sink_logit)
    return logits.sub_(total).exp_(), (sink_logit - total).exp_(), slope


def rule_deltas(
    probabilities: Tensor,
    centred: Tensor,
    tile: _Tile,
    table: RuleTable,
    native_window: int | None,
    escaped: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Returns `d_i(r)` of a tile's rows, summed over the query heads of each KV group.

    Args:
        probabilities: P, `[kv_heads, group, rows, keys of the tile]`, newest key first, zero where nothing is seen.
        centred: `P * (G - D)`, same shape.
        tile: which rows and keys.
        table: the rules.
        native_window: the model's own sliding window, or None.
        escaped: with a learned sink logit, its probability e and `e * D`, both `[kv_heads, group, rows, 1]`.

    Returns:
        `[kv_heads, rows, rules]`, exactly 0 where a rule masks nothing.
    """
    sink_end, start = table.segments(tile.rows + 1, native_window)
    shape = (*probabilities.shape[:-1], len(table.sink))
    window_at = (tile.high - 1 - start).expand(shape)
    # What the native window hides has probability 0, so the sinks' prefix sums may begin at the tile's oldest key.
    oldest = min(int(table.sink.max()), tile.high) - tile.low
    sink_at = (sink_end - tile.low).clamp_(0, max(oldest, 0)).expand(shape)

    def visible(values: Tensor) -> Tensor:
        total = values.cumsum(-1).gather(-1, window_at)
        if oldest > 0:
            prefix = functional.pad(values[..., -oldest:].flip(-1).cumsum(-1), (1, 0))
            total += prefix.gather(-1, sink_at)
        return total

    mass, pull = visible(probabilities), visible(centred)
    if escaped is not None:
        mass += escaped[0]
        pull -= escaped[1]
    deltas = pull.div_(mass.clamp_min_(torch.finfo(mass.dtype).tiny))
    return deltas.masked_fill_(sink_end >= start, 0).sum(1)


def attend(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, sink_logit: Tensor | None = None, tile: int = TILE
) -> Tensor:
    """Returns dense causal attention as the model defines it.

    Args:
        query: `[1, heads, N, head_dim]`.
        key: `[1, kv_heads, N, head_dim]`.
        value: as `key`.
        spec: how the layer attends.
        sink_logit: learned sink logit of each query head, `[heads]`, or None.
        tile: query rows worked on at a time.

    Returns:
        `[1, heads, N, head_dim]`.
    """
    heads, n, size = query.shape[1:]
    kv_heads = key.shape[1]
    native = spec.native_window
    if (native is None or native >= n) and spec.softcap is None and sink_logit is None:
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=spec.scaling, enable_gqa=heads != kv_heads
        )
    work = _work_dtype(query)
    keys, values = (tensor[0].to(work).flip(1) for tensor in (key, value))
    sink = None if sink_logit is None else sink_logit.to(work).view(kv_heads, -1, 1, 1)
    out = torch.empty_like(query)
    for part in _tiles(torch.arange(n, device=query.device), native, tile):
        rows, at = slice(part.first_row, part.high), part.columns(n)
        scaled = (query[0, :, rows].to(work) * spec.scaling).reshape(kv_heads, -1, size)
        probabilities, _, _ = _probabilities(scaled, keys[:, at], part, spec, sink)
        out[0, :, rows] = torch.bmm(probabilities.flatten(1, 2), values[:, at]).view(heads, -1, size)
    return out


def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    spec: AttentionSpec,
    sink_logit: Tensor | None,
    table: RuleTable,
    collector: Collector,
    tile: int = TILE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of `attend` and hands every row's deltas to `collector`.

    Rows whose cotangent is exactly zero (after the last answer token; in the last layer, all but the answer) take no
    part.

    Args:
        query: `[1, heads, N, head_dim]`.
        key: `[1, kv_heads, N, head_dim]`.
        value: as `key`.
        grad: cotangent of what `attend` returned.
        spec: how the layer attends.
        sink_logit: learned sink logit of each query head, `[heads]`, or None.
        table: the rules.
        collector: receives the deltas.
        tile: query rows worked on at a time.

    Returns:
        Gradients of query, key and value.
    """
    (heads, n, size), kv_heads, work = query.shape[1:], key.shape[1], _work_dtype(query)
    keys, values = (tensor[0].to(work).flip(1) for tensor in (key, value))
    sink = None if sink_logit is None else sink_logit.to(work).view(kv_heads, -1, 1, 1)
    grad_query = torch.zeros(heads, n, size, dtype=work, device=query.device)
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
    alive = grad[0].ne(0).any(-1).any(0).nonzero()[:, 0]
    for part in _tiles(alive, spec.native_window, tile) if len(alive) else []:
        at = part.columns(n)
        scaled, pulled = (tensor[0, :, part.rows].to(work).reshape(kv_heads, -1, size) for tensor in (query, grad))
        scaled = scaled * spec.scaling
        probabilities, escape, slope = _probabilities(scaled, keys[:, at], part, spec, sink)
        centred = torch.bmm(pulled, values[:, at].transpose(1, 2)).view_as(probabilities)
        # dO . O from these very P and G: a stored O is rounded to the model's dtype, which would swamp small deltas
        delta = (probabilities * centred).sum(-1, keepdim=True)
        centred.sub_(delta).mul_(probabilities)
        escaped = None if escape is None else (escape, escape * delta)
        collector.add(part.rows, rule_deltas(probabilities, centred, part, table, spec.native_window, escaped))
        grad_logits = (centred if slope is None else centred.mul_(slope)).flatten(1, 2)
        grad_query[:, part.rows] = torch.bmm(grad_logits, keys[:, at]).mul_(spec.scaling).view(heads, -1, size)
        grad_keys[:, at].baddbmm_(grad_logits.transpose(1, 2), scaled)
        grad_values[:, at].baddbmm_(probabilities.flatten(1, 2).transpose(1, 2), pulled)
    return (
        grad_query[None].to(query.dtype),
        grad_keys.flip(1)[None].to(key.dtype),
        grad_values.flip(1)[None].to(value.dtype),
    )


def _work_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class ProfiledAttention(torch.autograd.Function):
    """`attend`, whose backward pass runs `attend_backward` and so fills a collector, once for every backward."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink_logit: Tensor | None,
        spec: AttentionSpec,
        table: RuleTable,
        collector: Collector,
    ) -> Tensor:
        """Returns `attend(query, key, value, spec, sink_logit)`."""
        ctx.save_for_backward(query, key, value, sink_logit)
        ctx.spec, ctx.table, ctx.collector = spec, table, collector
        return attend(query, key, value, spec, sink_logit)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of query, key and value; the learned sink is a weight, and weights are frozen."""
        query, key, value, sink_logit = ctx.saved_tensors
        spec, table, collector = ctx.spec, ctx.table, ctx.collector
        gradients = attend_backward(query, key, value, grads[0], spec, sink_logit, table, collector)
        return (*gradients, None, None, None, None)
