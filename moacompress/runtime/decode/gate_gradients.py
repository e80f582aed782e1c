"""Gradients of a loss in what gates score, though who is kept is decided by comparing: a straight-through estimate.

A model under a plan is what it is; only the way back differs. Of every key that competes for a place it is known what a query's
output gains by it: `p / (1 - p) (value - output)` where it is kept, with the share `p` of the softmax, and `p (value - output)`
where it is not and its share would be `p`. Whether it is seen is taken for a steep sigmoid of how far its score is above the
edge, midway between the least that is kept and the best that is not, and who gains a place takes it from others: over the keys
that compete the changes add up to nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moacompress.core.arrays import Ints
from moacompress.kernels.arguments import Scores
from moacompress.kernels.reference.tiled import visible_keys
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.selection import EvictionSchedule
from moacompress.rules.windows import Span

TILE = 256
"""Queries that are worked on at a time."""
WIDTH = 0.3
"""Of the sigmoid, in units of scores, whose variance is 1 as gates are fitted."""
MUCH = 0.1
"""Least share of the rest in what is seen that a key is weighed against."""


class Attended(NamedTuple):
    """What attended in whole sequences without padding.

    Attributes:
        query: `[rows, heads, tokens, head_dim]`.
        key: `[rows, kv_heads, tokens, head_dim]`, as it is cached.
        value: `[rows, kv_heads, tokens, value_dim]`, as it is cached.
        rules: of the KV heads, in numpy.
        schedule: of the whole sequences.
        scores: how attention makes its scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    rules: RuleTable
    schedule: EvictionSchedule
    scores: Scores


class _ToScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, gate_scores: Tensor, attended: Attended) -> Tensor:
        query, key, value, *ctx.rest = attended
        ctx.save_for_backward(out, gate_scores, query.detach(), key.detach(), value.detach())
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out, gate_scores, *held = ctx.saved_tensors
        return grads[0], _score_gradients(grads[0], out, gate_scores, Attended(*held, *ctx.rest)), None


def with_gate_gradients(out: Tensor, gate_scores: Tensor, attended: Attended) -> Tensor:
    """Returns `out`, whose gradient also reaches what gates score.

    `out`: attention, `[rows, heads, tokens, value_dim]`. `gate_scores`: of the tokens, not rounded, `[rows, kv_heads, tokens]`.
    """
    found = _ToScores.apply(out, gate_scores, attended)  # type: ignore[no-untyped-call]
    assert isinstance(found, Tensor)
    return found


def _score_gradients(grad: Tensor, out: Tensor, gate_scores: Tensor, attended: Attended) -> Tensor:
    """Returns the gradient of a loss in what gates score, `[rows, kv_heads, tokens]`, from that in `out`."""
    query, key, value, rules, schedule, scores = attended
    rows, kv_heads, tokens, _ = key.shape
    grouped = [each.reshape(rows, kv_heads, -1, tokens, each.shape[-1]) for each in (grad, out, query)]
    found, times = torch.zeros_like(gate_scores), rules.tokens_left(1 + np.arange(tokens))
    for row in range(rows):
        for head in np.flatnonzero(rules.selecting).tolist():
            parts = (each[row, head].float() for each in (*grouped, key, value, gate_scores))
            span = Span(*rules.columns[: len(Span._fields), head].tolist())
            logits = scores.sink_logits
            if logits is not None:
                logits = (logits[row] if scores.by_query else logits[:, None]).unflatten(0, (kv_heads, -1))[head]
            own = None if logits is None else logits.float().expand(-1, tokens)
            found[row, head] = _of_head(
                *parts,
                competing=schedule.of_head(row, head),
                times=times[:, head],
                span=span,
                scores=scores._replace(sink_logits=own),
            )
    return found


def _of_head(
    grad: Tensor,
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_scores: Tensor,
    *,
    competing: EvictionSchedule,
    times: Ints,
    span: Span,
    scores: Scores,
) -> Tensor:
    """Returns `_score_gradients` of one row and KV head, `[tokens]`.

    Args:
        grad: `[group, tokens, value_dim]`.
        out: `[group, tokens, value_dim]`.
        query: `[group, tokens, head_dim]`.
        key: `[tokens, head_dim]`.
        value: `[tokens, value_dim]`.
        gate_scores: `[tokens]`.
        competing: the tokens that leave the window in its time: those from the end of the sinks on.
        times: how many have left when each query attends, `[tokens]`.
        span: of the KV head.
        scores: how attention makes its scores, with the learned logits of the group's queries, `[group, tokens]`.
    """
    tokens, at = len(key), slice(span.sink, span.sink + len(competing.positions))
    found, positions = key.new_zeros(tokens), torch.arange(tokens, device=key.device)
    admitted, evicted, attends = (
        torch.from_numpy(each).to(key.device)
        for each in (competing.admitted, competing.evicted, np.ascontiguousarray(times))
    )
    for begin in range(0, tokens, TILE):
        rows = slice(begin, min(begin + TILE, tokens))
        now = attends[rows, None]
        if not bool(now.any()):
            continue
        there = admitted <= now
        selected = there & (now < evicted)
        visible = visible_keys(positions[rows, None] + 1, positions, span)
        visible[:, at] |= selected
        raw = query[:, rows] @ key.T * scores.scaling
        raw = torch.tanh(raw / scores.softcap) * scores.softcap if scores.softcap else raw
        lse = raw.masked_fill(~visible, -torch.inf).logsumexp(-1)
        if scores.sink_logits is not None:
            lse = torch.logaddexp(lse, scores.sink_logits[:, rows])
        rest = torch.where(selected, lse[..., None], torch.logaddexp(lse[..., None], raw[..., at]))
        share = (raw[..., at] - rest).exp()
        gained = share / torch.where(selected, (1 - share).clamp_min(MUCH), 1.0)
        change = grad[:, rows] @ value[at].T - (grad[:, rows] * out[:, rows]).sum(-1, keepdim=True)
        change = (gained * change).sum(0)
        found[at] += _moved(change, gate_scores[at], there, selected)
    return found


def _moved(change: Tensor, scores: Tensor, there: Tensor, selected: Tensor) -> Tensor:
    """Returns the gradient in scores, `[leaving]`, from that in what is seen, `[queries, leaving]`."""
    least = scores.masked_fill(~selected, torch.inf).amin(-1, keepdim=True)
    best = scores.masked_fill(~there | selected, -torch.inf).amax(-1, keepdim=True)
    contested = least.isfinite() & best.isfinite()
    bound = torch.where(contested, (least + best) / 2, torch.zeros_like(least))
    near = torch.sigmoid((scores - bound) / WIDTH)
    steep = (near * (1 - near) / WIDTH).masked_fill(~(there & contested), 0)
    mean = (change * steep).sum(-1, keepdim=True) / steep.sum(-1, keepdim=True).clamp_min(1e-20)
    return ((change - mean) * steep).sum(0)
