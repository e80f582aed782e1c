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
a format does is told from the gradients, see `precision`. Codes of keys are of what they are less their centre.

Where a backend has a sweep of its own and all that is wanted are sums, it makes gradients and sums at once; what is here in
PyTorch is its reference, what collectors that look at whole tiles get, and what runs on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moacompress.calibration.profile.collectors import LayerSums, SumCollector
from moacompress.calibration.profile.tiles import (
    AttentionSpec,
    CachedPart,
    Collector,
    GradientCollector,
    TileView,
    mask_plan,
    tile_probabilities,
    tiles_of,
)
from moacompress.kernels import sdpa
from moacompress.kernels.arguments import Choices, Scores, TransientTokens, as_tensors
from moacompress.kernels.backend import prefill_alone
from moacompress.kernels.centred_keys import centred
from moacompress.kernels.dispatch import backend_for
from moacompress.kernels.reference.rounding import as_kept
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable

TILE = 64
"""Query rows worked on at a time."""
Given = tuple[Tensor, Tensor, Tensor, Tensor]
"""Query, key, value and cotangent of `attend_backward`."""


def _transient(own: Tensor, rules: RuleTable) -> TransientTokens:
    """Returns the tokens that a layer's rules select, from when they are evicted; `own` as in `Choices`."""
    tokens = torch.arange(own.shape[1])
    admitted = tokens - torch.from_numpy(np.asarray(rules.span.sink))[:, None] + 1
    heads, at = ((admitted > 0) & (own > admitted)).nonzero(as_tuple=True)
    begins = torch.searchsorted(heads, torch.arange(len(own) + 1))
    return TransientTokens(begins, -1 - at, admitted[heads, at], own[heads, at].long())


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: AttentionSpec,
    sink_logit: Tensor | None = None,
    plan: RuleTable | None = None,
    own: Tensor | None = None,
) -> Tensor:
    """Returns causal attention as the model defines it, dense or under a plan, `[1, heads, N, head_dim]`.

    Args:
        query: `[1, heads, N, head_dim]`.
        key: `[1, kv_heads, N, head_dim]`, in the plan's formats already.
        value: `[1, kv_heads, N, head_dim]`, in the plan's formats already.
        spec: how the layer attends.
        sink_logit: learned sink logit of each query head, `[heads]`, or None.
        plan: the rule of each KV head, or None for the dense model.
        own: see `Choices`, where rules of the plan select.
    """
    scores = spec.scores(sink_logit)
    if plan is None and own is None and sdpa.suits(query, scores):
        return sdpa.dense_attention(query, key, value, spec.scaling, spec.native_window)
    rules = (plan or RuleTable.of([Rule.FULL] * key.shape[1], 1)).native().in_layer(spec.native_window)
    here, transient = as_tensors(rules), None if own is None else _transient(own, rules)
    return prefill_alone(backend_for(query), query, key, value, rules=here, scores=scores, transient=transient)


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
    """Returns the gradients of query, key and value of `attend`, and hands every tile, or the sums of all, to the collectors.

    Rows whose cotangent is exactly zero (after the last answer token; in the last layer, all but the answer) take no
    part. Without `choices`, what rules that select choose, only their sinks and windows count.

    Args:
        query: `[1, heads, N, head_dim]`.
        key: `[1, kv_heads, N, head_dim]`, in the plan's formats already.
        value: `[1, kv_heads, N, head_dim]`, in the plan's formats already.
        grad: cotangent of what `attend` returned.
        spec: how the layer attends.
        sink_logit: learned sink logit of each query head, `[heads]`, or None.
        table: the rules.
        collectors: receive the tiles, or the sums of all.
        plan: the rule of each KV head, or None for the dense model.
        tile: query rows worked on at a time; the compiled kernel has its own.
        choices: see `Choices`.
    """
    given, native = (query, key, value, grad), spec.native_window
    table, plan = table.in_layer(native), None if plan is None else plan.native().in_layer(native)
    if backend_for(query).capabilities.profile:
        summing = [collector for collector in collectors if isinstance(collector, SumCollector)]
        found = _sweep(given, spec.scores(sink_logit), table, summing, plan, choices)
        if looking := [collector for collector in collectors if not isinstance(collector, SumCollector)]:
            for view, _, _, _ in _views(given, spec, sink_logit, table, plan, tile, choices):
                for collector in looking:
                    collector.add(view)
        return found
    if plan is None and not collectors and sdpa.suits(query, spec.scores(sink_logit)):
        return sdpa.dense_gradients(grad, query, key, value, spec.scaling, native)
    (heads, n, size), work = query.shape[1:], _work_dtype(query)
    grad_query = torch.zeros(heads, n, size, dtype=work, device=query.device)
    grad_keys, grad_values = (torch.zeros_like(tensor[0], dtype=work) for tensor in (key, value))  # newest key first
    for view, attended, grad_logits, slope in _views(given, spec, sink_logit, table, plan, tile, choices):
        for collector in collectors:
            collector.add(view)
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


def _sweep(
    given: Given,
    scores: Scores,
    table: RuleTable,
    collectors: Sequence[SumCollector],
    plan: RuleTable | None,
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
        plan=None if plan is None else as_tensors(plan),
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
    plan: RuleTable | None,
    tile: int,
    choices: Choices | None,
) -> Iterator[tuple[TileView, Tensor, Tensor, Tensor | None]]:
    """Yields every tile of `attend_backward`, and what its gradients are made of.

    That is the probabilities that its rows attend with; the gradient of their logits, without the derivative of the soft cap;
    and that derivative, or None.
    """
    query, key, value, grad = given
    kv_heads, size, work = key.shape[1], query.shape[3], _work_dtype(query)
    table, plan = as_tensors(table, query.device), None if plan is None else as_tensors(plan, query.device)
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
        attended = probabilities
        if plan is not None:
            attended = mask_plan(probabilities.clone(), part, plan, None if choices is None else choices.own, 0)
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


def as_attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    formats: tuple[Sequence[int], Sequence[int]] | None,
    centre: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `as_kept` of keys that lie less their centre, `[kv_heads, head_dim]`, and keys with it again."""
    if formats is None or centre is None:
        return as_kept(query, key, value, formats)
    asking, less, values = as_kept(query, centred(key, centre), value, formats)
    return asking, less + centre[:, None], values


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
        centre: Tensor | None = None,
    ) -> Tensor:
        """Returns `attend` of what `as_attended` returns, in the query's dtype."""
        seen = as_attended(query, key, value, None if plan is None else plan.formats, centre)
        ctx.save_for_backward(query, key, value, sink_logit, *(seen if seen[1] is not key else ()))
        ctx.spec, ctx.table, ctx.collectors, ctx.plan, ctx.choices = spec, table, collectors, plan, choices
        ctx.centre = centre
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
        if ending:
            less = centred(key, ctx.centre)
            keys = CachedPart(less, less if seen[1] is key else centred(seen[1], ctx.centre), gradients[1])
            for collector in ending:
                collector.take_gradients(keys, CachedPart(value, seen[2], gradients[2]))
        straight = (grad.to(query.dtype) for grad in gradients)  # what is rounded hands its gradient on as it is
        return (*straight, None, None, None, None, None, None, None)
