"""Attention whose backward pass also says what every rule would cost: pure functions on tensors.

For one layer with output `O`, cotangent `dO` and probabilities `P`, let `G = dO V^T` and `D_i = dO_i . O_i`. A KV head
under rule r renormalises the probabilities of the keys that row i still sees, so its output moves along `dO_i` by

    d_i(r) = dO_i . (O_i under r - O_i) = (K_i - e_i D_i) / (A_i + e_i),  K_i = sum of P (G - D),  A_i = sum of P

with both sums over the visible keys, and `e_i` the probability of a learned sink logit (0 for models without one).
This is exact, not a first-order expansion: the expansion is in how the loss depends on O. The query heads of a KV group
are added before anything is squared. Queries are worked on in tiles of rows, so nothing of size N x N is ever held, and
one pair of cumulative sums over the keys serves all rules.

A layer may itself run under a plan. Then O and D are those under the plan, P is that of all keys, and the same formula says
what every change of a span does, up or down. Keys and values are as the plan's formats keep them, in float32; what a change of
a format does is told from the gradients, see `precision`.

Where a backend has a sweep of its own and all that is wanted are sums, it makes gradients and sums at once; what is here in
PyTorch is its reference, and what collectors that look at whole tiles get.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moacompress.calibration.profile.sweep import SumCollector, summed, swept
from moacompress.kernels import sdpa
from moacompress.kernels.arguments import Choices, Passing, Scores, as_tensors
from moacompress.kernels.backend import prefill_alone
from moacompress.kernels.dispatch import backend_for
from moacompress.kernels.reference.rounding import as_kept
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import selected

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

    def scores(self, sink_logit: Tensor | None) -> Scores:
        """Returns how scores are made, with a learned sink logit of each query head, `[heads]`, or None."""
        return Scores(self.scaling, self.softcap or 0.0, sink_logit)


class Tile(NamedTuple):
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
        """End of its keys: the last row sees itself."""
        return self.last_row + 1

    def columns(self, n: int) -> slice:
        """Returns where its keys are among all `n` keys, newest first."""
        return slice(n - self.high, n - self.low)


def _tiles(rows: Tensor, native_window: int | None, size: int) -> list[Tile]:
    tiles = []
    for part in rows.split(size):
        first, last = (int(end) for end in part[[0, -1]].tolist())
        tiles.append(Tile(part, first, last, 0 if native_window is None else max(0, first + 1 - native_window)))
    return tiles


def _mask_logits(logits: Tensor, tile: Tile, native_window: int | None) -> None:
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


def tile_probabilities(
    query: Tensor,
    keys: Tensor,
    tile: Tile,
    spec: AttentionSpec,
    sink_logit: Tensor | None,
    plan: RuleTable | None = None,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the attention probabilities of a tile.

    Args:
        query: `[kv_heads, group * rows, head_dim]`, scaled.
        keys: `[kv_heads, keys of the tile, head_dim]`, newest first.
        tile: which rows and keys.
        spec: how the layer attends.
        sink_logit: learned sink logit of each query head, `[kv_heads, group, 1, 1]`, or None.
        plan: the rule of each KV head of this layer, on the query's device, or None for the dense model.
        own: see `Choices`, where rules of the plan select.

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
    if plan is not None:
        _mask_plan(logits, tile, plan, own, -torch.inf)
    if sink_logit is None:
        return torch.softmax(logits, -1), None, slope
    total = torch.logaddexp(torch.logsumexp(logits, -1, keepdim=True), sink_logit)
    return logits.sub_(total).exp_(), (sink_logit - total).exp_(), slope


@dataclass(frozen=True)
class TileView:
    """What the backward pass of one layer knows about a tile of rows; collectors read from it what they need.

    Attributes:
        tile: which rows and keys.
        table: the rules, for this layer and on its device.
        probabilities: P, of all that the dense model sees, `[kv_heads, group, rows, keys of the tile]`, newest key first,
            zero where nothing is seen.
        centred: `P * (G - D)`, same shape; D is that of the output as the layer computes it.
        escaped: with a learned sink logit, its probability e and `e * D`, both `[kv_heads, group, rows, 1]`.
        plan: the rule that each KV head runs under, or None for the dense model.
        query: scaled queries of the rows, `[kv_heads, group * rows, head_dim]`.
        cotangent: dO of the rows, same shape.
        keys: keys of the tile, newest first, `[kv_heads, keys, head_dim]`.
        values: as `keys`.
        choices: what rules that select choose, or None.
    """

    tile: Tile
    table: RuleTable
    probabilities: Tensor
    centred: Tensor
    escaped: tuple[Tensor, Tensor] | None
    plan: RuleTable | None
    query: Tensor
    cotangent: Tensor
    keys: Tensor
    values: Tensor
    choices: Choices | None = None

    @property
    def rows(self) -> Tensor:
        """Query positions, int64 `[rows]`."""
        return self.tile.rows

    @cached_property
    def segments(self) -> tuple[Tensor, Tensor]:
        """`(sink_end, start)` of every row and rule, each `[rows, rules]`: what lies between is hidden."""
        return _hidden(self.table, self.rows)

    @cached_property
    def deltas(self) -> Tensor:
        """`d_i(r)`, summed over the query heads of each KV group: `[kv_heads, rows, rules]`.

        Exactly 0 where a rule hides nothing else than the rule that the layer runs under, whatever gates select.
        """
        mass, pull = self.visible(self.probabilities), self.visible(self.centred)
        if self.escaped is not None:
            mass += self.escaped[0]
            pull -= self.escaped[1]
        deltas = pull.div_(mass.clamp_min_(torch.finfo(mass.dtype).tiny)).sum(1)
        return deltas.masked_fill_(self._unchanged(), 0)

    def visible(self, values: Tensor) -> Tensor:
        """Returns sums over the keys that each rule sees, `[kv_heads, group, rows, rules]`.

        Args:
            values: `[kv_heads, group, rows, keys of the tile]`, zero where the dense model sees nothing.
        """
        shape = (*values.shape[:-1], len(self.table))
        total = values.cumsum(-1).gather(-1, self._window_at.expand(shape))
        if self._oldest > 0:
            prefix = functional.pad(values[..., -self._oldest :].flip(-1).cumsum(-1), (1, 0))
            total += prefix.gather(-1, self._sink_at.expand(shape))
        for number, mask in self._selected:
            total[..., number] += (values * mask[:, None]).sum(-1)
        return total

    @cached_property
    def _selected(self) -> list[tuple[int, Tensor]]:
        """Of every rule that selects its number and what it keeps beside sinks and window, bool `[kv_heads, rows, keys]`."""
        if self.choices is None:
            return []
        keys = torch.arange(self.tile.high - 1, self.tile.low - 1, -1, device=self.rows.device)
        found = []
        for number, way in enumerate(self.choices.of_rule.tolist()):
            if way < 0:
                continue
            admitted = keys - int(self.table.span.sink[number]) + 1
            evicted = self.choices.evicted[:, way].to(keys.device)[:, None, keys]
            now = self._left[:, number, None]
            found.append((number, (admitted > 0) & (admitted <= now) & (now < evicted)))
        return found

    @cached_property
    def _left(self) -> Tensor:
        """How many tokens have left the window of every row and rule, `[rows, rules]`."""
        return (self.segments[1] - self.segments[0]).clamp_min(0)

    @cached_property
    def _kept(self) -> Tensor:
        """How many of them each rule keeps, `[rows, rules]`."""
        if self.choices is None:
            return torch.zeros_like(self._left)
        kept: Tensor = selected(self._left, *self.table.select)
        return kept * (self.choices.of_rule >= 0).to(self._left.device)

    @cached_property
    def full(self) -> Tensor:
        """Whether each rule sees all that the dense model sees, bool `[rows, rules]`."""
        return self._kept >= self._left

    @cached_property
    def _window_at(self) -> Tensor:
        return self.tile.high - 1 - self.segments[1]

    @cached_property
    def _oldest(self) -> int:
        """Columns that may be sinks. What the native window hides has probability 0: sums begin at the tile's oldest."""
        return max(0, min(int(self.table.span.sink.max()), self.tile.high) - self.tile.low)

    @cached_property
    def _sink_at(self) -> Tensor:
        return (self.segments[0] - self.tile.low).clamp(0, self._oldest)

    def _unchanged(self) -> Tensor:
        """Returns which rules see what the layer sees now, broadcastable to `[kv_heads, rows, rules]`."""
        sink_end, start = self.segments
        if self.plan is None:
            return self.full
        now_end, now_start = (edge.T[..., None] for edge in _hidden(self.plan, self.rows))
        now_left = (now_start - now_end).clamp_min(0)
        own = self.choices is not None and self.choices.own is not None
        now_kept = selected(now_left, *(part[:, None, None] for part in self.plan.select)) if own else 0 * now_left
        selected_alike = (self._kept == now_kept) & ((self._kept == 0) | self._alike)
        same = (sink_end == now_end) & (start == now_start) & selected_alike
        return same | (self.full & (now_kept >= now_left))

    @cached_property
    def _alike(self) -> Tensor:
        """Whether each KV head's own rule chooses as each of the rules does, `[kv_heads, 1, rules]`."""
        assert self.plan is not None
        sides = (torch.stack([table.span.sink, *table.select]) for table in (self.plan, self.table))
        own, asked = (numbers.to(self.rows.device) for numbers in sides)
        return (own[:, :, None] == asked[:, None]).all(0)[:, None]


class Collector(Protocol):
    """What receives every tile of rows of a layer's backward pass."""

    def add(self, view: TileView) -> None:
        """Takes one tile."""


class CachedPart(NamedTuple):
    """A layer's keys or its values, and what a backward pass says of them, `[1, kv_heads, N, dim]` each.

    Attributes:
        given: as the model makes them, keys after their rotary embedding.
        seen: as the layer attends to them: rounded where its plan says so.
        grad: gradient of `seen`.
    """

    given: Tensor
    seen: Tensor
    grad: Tensor


@runtime_checkable
class GradientCollector(Protocol):
    """What receives the gradients of a layer's keys and values, once a backward pass."""

    def take_gradients(self, keys: CachedPart, values: CachedPart) -> None:
        """Takes them."""


def _hidden(table: RuleTable, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where what each rule hides begins and ends, `[rows, rules]` each; the native window hides more."""
    (_, sink_end), (start, _) = table.visible_intervals(rows + 1)
    return sink_end, start


def _mask_plan(logits: Tensor, tile: Tile, plan: RuleTable, own: Tensor | None, fill: float) -> Tensor:
    """Fills what each KV head's own rule hides, in place; `logits` is `[kv_heads, group, rows, keys of the tile]`."""
    sink_end, start = (edge.T[..., None] for edge in _hidden(plan, tile.rows))
    keys = torch.arange(tile.high - 1, tile.low - 1, -1, device=logits.device)
    hidden = (keys >= sink_end) & (keys < start)
    if own is not None:
        hidden &= start - sink_end >= own.to(keys.device)[:, None, keys]
    return logits.masked_fill_(hidden[:, None], fill)


def _passing(own: Tensor, rules: RuleTable) -> Passing:
    """Returns the tokens that the rules a layer runs under select, from when they are evicted.

    Args:
        own: see `Choices`.
        rules: of the KV heads, with a numpy array.
    """
    tokens = torch.arange(own.shape[1])
    admitted = tokens - torch.from_numpy(np.asarray(rules.span.sink))[:, None] + 1
    heads, at = ((admitted > 0) & (own > admitted)).nonzero(as_tuple=True)
    begins = torch.searchsorted(heads, torch.arange(len(own) + 1))
    return Passing(begins, -1 - at, admitted[heads, at], own[heads, at].long())


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: AttentionSpec,
    sink_logit: Tensor | None = None,
    plan: RuleTable | None = None,
    own: Tensor | None = None,
) -> Tensor:
    """Returns causal attention as the model defines it, dense or under a plan.

    Args:
        query: `[1, heads, N, head_dim]`.
        key: `[1, kv_heads, N, head_dim]`.
        value: as `key`.
        spec: how the layer attends.
        sink_logit: learned sink logit of each query head, `[heads]`, or None.
        plan: the rule of each KV head, or None for the dense model; its formats are those of key and value already.
        own: see `Choices`, where rules of the plan select.

    Returns:
        `[1, heads, N, head_dim]`.
    """
    scores = spec.scores(sink_logit)
    if plan is None and own is None and sdpa.suits(query, scores):
        return sdpa.dense_attention(query, key, value, spec.scaling, spec.native_window)
    rules = (plan or RuleTable.of([Rule.FULL] * key.shape[1], 1)).native().in_layer(spec.native_window)
    here, passing = as_tensors(rules), None if own is None else _passing(own, rules)
    return prefill_alone(backend_for(query), query, key, value, rules=here, scores=scores, passing=passing)


def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    spec: AttentionSpec,
    sink_logit: Tensor | None,
    table: RuleTable,
    collectors: Sequence[Collector],
    plan: RuleTable | None = None,
    tile: int = TILE,
    choices: Choices | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of `attend` and hands every tile to the collectors.

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
        collectors: receive the tiles, or the sums of all.
        plan: the rule of each KV head, or None for the dense model; its formats are those of key and value already.
        tile: query rows worked on at a time; the compiled kernel has its own.
        choices: what rules that select choose; without them they are taken for their sinks and windows alone.

    Returns:
        Gradients of query, key and value.
    """
    chunk, native = (query, key, value, grad), spec.native_window
    table, plan = table.in_layer(native), None if plan is None else plan.native().in_layer(native)
    if backend_for(query).capabilities.profile:
        summing = [collector for collector in collectors if isinstance(collector, SumCollector)]
        found = swept(*chunk, spec, sink_logit, table, summing, plan, choices)
        if looking := [collector for collector in collectors if not isinstance(collector, SumCollector)]:
            for view, _, _, _ in _views(*chunk, spec, sink_logit, table, plan, tile, choices):
                for collector in looking:
                    collector.add(view)
        return found
    scores = spec.scores(sink_logit)
    if plan is None and choices is None:
        collectors = summed(*chunk, scores, table, collectors)
        if not collectors and sdpa.suits(query, scores):
            return sdpa.dense_gradients(grad, query, key, value, spec.scaling, native)
        if not collectors and backend_for(query).capabilities.profile_sums:
            return _plain_gradients(query, key, value, grad, spec, sink_logit)
    (heads, n, size), work = query.shape[1:], _work_dtype(query)
    grad_query = torch.zeros(heads, n, size, dtype=work, device=query.device)
    grad_keys, grad_values = (torch.zeros_like(tensor[0], dtype=work) for tensor in (key, value))  # newest key first
    for view, attended, grad_logits, slope in _views(*chunk, spec, sink_logit, table, plan, tile, choices):
        for other in collectors:
            other.add(view)
        at = view.tile.columns(n)
        grad_logits = (grad_logits if slope is None else grad_logits.mul_(slope)).flatten(1, 2)
        grad_query[:, view.rows] = torch.bmm(grad_logits, view.keys).mul_(spec.scaling).view(heads, -1, size)
        grad_keys[:, at].baddbmm_(grad_logits.transpose(1, 2), view.query)
        grad_values[:, at].baddbmm_(attended.flatten(1, 2).transpose(1, 2), view.cotangent)
    return (
        grad_query[None].to(query.dtype),
        grad_keys.flip(1)[None].to(key.dtype),
        grad_values.flip(1)[None].to(value.dtype),
    )


def _plain_gradients(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, spec: AttentionSpec, sink_logit: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of dense attention by the backend's own; arguments are those of `attend_backward`."""
    with torch.enable_grad():
        leaves = [part.detach().requires_grad_() for part in (query, key, value)]
        out = attend(leaves[0], leaves[1], leaves[2], spec, None if sink_logit is None else sink_logit.detach())
        found = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    return found[0], found[1], found[2]


def _views(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    spec: AttentionSpec,
    sink_logit: Tensor | None,
    table: RuleTable,
    plan: RuleTable | None,
    tile: int,
    choices: Choices | None,
) -> Iterator[tuple[TileView, Tensor, Tensor, Tensor | None]]:
    """Yields tile after tile of `attend_backward`, and what its gradients are made of.

    Yields:
        The tile; the probabilities that its rows attend with; the gradient of their logits, but for the derivative of the
        soft cap, which comes last or is None.
    """
    kv_heads, size, work = key.shape[1], query.shape[3], _work_dtype(query)
    table, plan = as_tensors(table, query.device), None if plan is None else as_tensors(plan, query.device)
    keys, values = (tensor[0].to(work).flip(1) for tensor in (key, value))
    sink = None if sink_logit is None else sink_logit.to(work).view(kv_heads, -1, 1, 1)
    alive = grad[0].ne(0).any(-1).any(0).nonzero()[:, 0]
    for part in _tiles(alive, spec.native_window, tile) if len(alive) else []:
        at = part.columns(key.shape[2])
        scaled, pulled = (tensor[0, :, part.rows].to(work).reshape(kv_heads, -1, size) for tensor in (query, grad))
        scaled = scaled * spec.scaling
        probabilities, escape, slope = tile_probabilities(scaled, keys[:, at], part, spec, sink)
        attended = probabilities
        if plan is not None:
            attended = _mask_plan(probabilities.clone(), part, plan, None if choices is None else choices.own, 0)
            mass = attended.sum(-1, keepdim=True) if escape is None else attended.sum(-1, keepdim=True) + escape
            attended.div_(mass)
        centred = torch.bmm(pulled, values[:, at].transpose(1, 2)).view_as(probabilities)
        # dO . O from these very P and G: a stored O is rounded to the model's dtype, which would swamp small deltas
        delta = (attended * centred).sum(-1, keepdim=True)
        centred.sub_(delta)
        grad_logits = centred * attended if plan is not None else centred
        centred.mul_(probabilities)
        view = TileView(
            tile=part,
            table=table,
            probabilities=probabilities,
            centred=centred,
            escaped=None if escape is None else (escape, escape * delta),
            plan=plan,
            query=scaled,
            cotangent=pulled,
            keys=keys[:, at],
            values=values[:, at],
            choices=choices,
        )
        yield view, attended, grad_logits, slope


def _work_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class ProfiledAttention(torch.autograd.Function):
    """`attend` under a plan's formats, whose backward pass runs `attend_backward` and fills collectors, every time."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink_logit: Tensor | None,
        spec: AttentionSpec,
        table: RuleTable,
        collectors: Sequence[Collector | GradientCollector],
        plan: RuleTable | None = None,
        choices: Choices | None = None,
    ) -> Tensor:
        """Returns `attend` of what `as_kept` returns, in the query's dtype."""
        seen = as_kept(query, key, value, None if plan is None else plan.formats)
        ctx.save_for_backward(query, key, value, sink_logit, *(seen if seen[1] is not key else ()))
        ctx.spec, ctx.table, ctx.collectors, ctx.plan, ctx.choices = spec, table, collectors, plan, choices
        return attend(*seen, spec, sink_logit, plan, None if choices is None else choices.own).to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of query, key and value; the learned sink is a weight, and weights are frozen."""
        query, key, value, sink_logit, *rounded_ones = ctx.saved_tensors
        seen: tuple[Tensor, Tensor, Tensor] = tuple(rounded_ones) or (query, key, value)
        ending = [collector for collector in ctx.collectors if isinstance(collector, GradientCollector)]
        tiled = [collector for collector in ctx.collectors if not isinstance(collector, GradientCollector)]
        pulled = grads[0].to(seen[0].dtype)
        gradients = attend_backward(
            *seen, pulled, ctx.spec, sink_logit, ctx.table, tiled, ctx.plan, choices=ctx.choices
        )
        for collector in ending:
            collector.take_gradients(
                *(CachedPart(*one) for one in zip((key, value), seen[1:], gradients[1:], strict=True))
            )
        straight = (grad.to(query.dtype) for grad in gradients)  # what is rounded hands its gradient on as it is
        return (*straight, None, None, None, None, None, None)
