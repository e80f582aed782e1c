"""Attention whose backward pass also says what every rule would cost: pure functions on tensors.

For one layer with output `O`, cotangent `dO` and probabilities `P`, let `G = dO V^T` and `D_i = dO_i . O_i`. A KV head
under rule r renormalises the probabilities of the keys that row i still sees, so its output moves along `dO_i` by

    d_i(r) = dO_i . (O_i under r - O_i) = (K_i - e_i D_i) / (A_i + e_i),  K_i = sum of P (G - D),  A_i = sum of P

with both sums over the visible keys, and `e_i` the probability of a learned sink logit (0 for models without one).
This is exact, not a first-order expansion: the expansion is in how the loss depends on O. The query heads of a KV group
are added before anything is squared. Queries are worked on in tiles of rows, so nothing of size N x N is ever held, and
one pair of cumulative sums over the keys serves all rules.

What formats do is told from the gradients, see `precision`. Codes of keys are of what they are less their centre.

Where a backend has a sweep of its own and all that is wanted are sums, it makes gradients and sums at once; what is here in
PyTorch is its reference, what collectors that look at whole tiles get, and what runs on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moacompress.calibration.profile.collectors import LayerSums, SumCollector
from moacompress.calibration.profile.tiles import (
    AttentionSpec,
    CachedPart,
    Collector,
    GradientCollector,
    TileView,
    tile_probabilities,
    tiles_of,
)
from moacompress.kernels import sdpa
from moacompress.kernels.arguments import Choices, Scores, as_tensors
from moacompress.kernels.backend import prefill_alone
from moacompress.kernels.centred_keys import centred
from moacompress.kernels.dispatch import backend_for
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable

TILE = 64
"""Query rows worked on at a time."""
Given = tuple[Tensor, Tensor, Tensor, Tensor]
"""Query, key, value and cotangent of `attend_backward`."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: AttentionSpec,
    sink_logit: Tensor | None = None,
) -> Tensor:
    """Returns causal attention as the dense model defines it, `[1, heads, N, head_dim]`.

    Args:
        query: `[1, heads, N, head_dim]`.
        key: `[1, kv_heads, N, head_dim]`.
        value: `[1, kv_heads, N, head_dim]`.
        spec: how the layer attends.
        sink_logit: learned sink logit of each query head, `[heads]`, or None.
    """
    scores = spec.scores(sink_logit)
    if sdpa.suits(query, scores):
        return sdpa.dense_attention(query, key, value, spec.scaling, spec.native_window)
    rules = as_tensors(RuleTable.of([Rule.FULL] * key.shape[1], 1).in_layer(spec.native_window))
    return prefill_alone(backend_for(query), query, key, value, rules=rules, scores=scores)


def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    spec: AttentionSpec,
    sink_logit: Tensor | None,
    table: RuleTable,
    collectors: Sequence[Collector],
    tile: int = TILE,
    choices: Choices | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value of `attend`, and hands every tile, or the sums of all, to the collectors.

    Rows whose cotangent is exactly zero (after the last answer token; in the last layer, all but the answer) take no
    part. Without `choices`, what rules that select choose, only their sinks and windows count.

    Args:
        query: `[1, heads, N, head_dim]`.
        key: `[1, kv_heads, N, head_dim]`.
        value: `[1, kv_heads, N, head_dim]`.
        grad: cotangent of what `attend` returned.
        spec: how the layer attends.
        sink_logit: learned sink logit of each query head, `[heads]`, or None.
        table: the rules.
        collectors: receive the tiles, or the sums of all.
        tile: query rows worked on at a time; the compiled kernel has its own.
        choices: see `Choices`.
    """
    given, native = (query, key, value, grad), spec.native_window
    table = table.in_layer(native)
    if backend_for(query).capabilities.profile:
        summing = [collector for collector in collectors if isinstance(collector, SumCollector)]
        found = _sweep(given, spec.scores(sink_logit), table, summing, choices)
        if looking := [collector for collector in collectors if not isinstance(collector, SumCollector)]:
            for view, _ in _views(given, spec, sink_logit, table, tile, choices):
                for collector in looking:
                    collector.add(view)
        return found
    if not collectors and sdpa.suits(query, spec.scores(sink_logit)):
        return sdpa.dense_gradients(grad, query, key, value, spec.scaling, native)
    (heads, n, size), work = query.shape[1:], _work_dtype(query)
    grad_query = torch.zeros(heads, n, size, dtype=work, device=query.device)
    grad_keys, grad_values = (torch.zeros_like(tensor[0], dtype=work) for tensor in (key, value))  # newest key first
    for view, slope in _views(given, spec, sink_logit, table, tile, choices):
        for collector in collectors:
            collector.add(view)
        at = view.tile.columns(n)
        grad_logits = (view.centred if slope is None else view.centred.mul_(slope)).flatten(1, 2)
        grad_query[:, view.rows] = torch.bmm(grad_logits, view.keys).mul_(spec.scaling).view(heads, -1, size)
        grad_keys[:, at].baddbmm_(grad_logits.transpose(1, 2), view.query)
        grad_values[:, at].baddbmm_(view.probabilities.flatten(1, 2).transpose(1, 2), view.cotangent)
    return (
        grad_query[None].to(query.dtype),
        grad_keys.flip(1)[None].to(key.dtype),
        grad_values.flip(1)[None].to(value.dtype),
    )


def _sweep(
    given: Given,
    scores: Scores,
    table: RuleTable,
    collectors: Sequence[SumCollector],
    choices: Choices | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of `attend_backward` by a backend's compiled sweep, which also adds up all tiles."""
    query, key, value, grad = given
    baselines = any(collector.baselines for collector in collectors)
    lag = next((collector.lag for collector in collectors if collector.lag is not None), None)
    *gradients, sums, of_tokens, rows = backend_for(query).profile_backward(
        grad,
        query,
        key,
        value,
        rules=as_tensors(table),
        scores=scores,
        baselines=baselines,
        lag=lag,
        choices=choices,
    )
    moa, mass = sums[2:] if baselines else (None, None)
    found = LayerSums(sums[0], sums[1], moa, mass, rows, None if lag is None else of_tokens)
    for collector in collectors:
        collector.add_sums(found)
    return gradients[0], gradients[1], gradients[2]


def _views(
    given: Given,
    spec: AttentionSpec,
    sink_logit: Tensor | None,
    table: RuleTable,
    tile: int,
    choices: Choices | None,
) -> Iterator[tuple[TileView, Tensor | None]]:
    """Yields every tile of `attend_backward` with the derivative of the soft cap, or None."""
    query, key, value, grad = given
    kv_heads, size, work = key.shape[1], query.shape[3], _work_dtype(query)
    table = as_tensors(table, query.device)
    if choices is not None:
        choices = choices._replace(evicted=choices.evicted.to(query.device))
    keys, values = (tensor[0].to(work).flip(1) for tensor in (key, value))
    sink = None if sink_logit is None else sink_logit.to(work).view(kv_heads, -1, 1, 1)
    alive = grad[0].ne(0).any(-1).any(0).nonzero()[:, 0]
    for part in tiles_of(alive, spec.native_window, tile) if len(alive) else []:
        at = part.columns(key.shape[2])
        scaled, pulled = (tensor[0, :, part.rows].to(work).reshape(kv_heads, -1, size) for tensor in (query, grad))
        scaled = scaled * spec.scaling
        probabilities, escape, slope = tile_probabilities(scaled, keys[:, at], part, spec, sink)
        centred = torch.bmm(pulled, values[:, at].transpose(1, 2)).view_as(probabilities)
        # dO . O from these very P and G: a stored O is rounded to the model's dtype, which would swamp small deltas
        delta = (probabilities * centred).sum(-1, keepdim=True)
        centred.sub_(delta).mul_(probabilities)
        view = TileView(
            tile=part,
            table=table,
            probabilities=probabilities,
            centred=centred,
            escaped=None if escape is None else (escape, escape * delta),
            query=scaled,
            cotangent=pulled,
            keys=keys[:, at],
            values=values[:, at],
            choices=choices,
        )
        yield view, slope


def _work_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class ProfiledAttention(torch.autograd.Function):
    """`attend`, whose backward pass runs `attend_backward` and fills collectors, every time."""

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
        choices: Choices | None = None,
        centre: Tensor | None = None,
    ) -> Tensor:
        """Returns `attend`; codes of keys would be of what they are less `centre`, `[kv_heads, head_dim]`."""
        ctx.save_for_backward(query, key, value, sink_logit)
        ctx.spec, ctx.table, ctx.collectors, ctx.choices, ctx.centre = spec, table, collectors, choices, centre
        return attend(query, key, value, spec, sink_logit)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of query, key and value; the learned sink is a weight, and weights are frozen."""
        query, key, value, sink_logit = ctx.saved_tensors
        ending = [collector for collector in ctx.collectors if isinstance(collector, GradientCollector)]
        tiled = [collector for collector in ctx.collectors if not isinstance(collector, GradientCollector)]
        gradients = attend_backward(
            query, key, value, grads[0], ctx.spec, sink_logit, ctx.table, tiled, choices=ctx.choices
        )
        if ending:
            keys = CachedPart(centred(key, ctx.centre), gradients[1])
            for collector in ending:
                collector.take_gradients(keys, CachedPart(value, gradients[2]))
        return (*gradients, None, None, None, None, None, None)
