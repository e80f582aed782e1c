"""Gradients of a loss in what gates score, though who is kept is decided by comparing: a straight-through estimate.

A model under a plan is what it is; only the way back differs. Of every key that competes for a place it is known what a query's
output gains by it: `p / (1 - p) (value - output)` where it is kept, with the share `p` of the softmax, and `p (value - output)`
where it is not and its share would be `p`. Whether it is seen is taken for a steep sigmoid of how far its score is above the
edge, midway between the least that is kept and the best that is not, and who gains a place takes it from others: over the keys
that compete the changes add up to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moacompress.core.arrays import Ints
from moacompress.kernels.arguments import Scores
from moacompress.kernels.reference.tiled import visible_keys
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.selection import Turnover
from moacompress.rules.windows import Span

TILE = 256
"""Queries that are worked on at a time."""
WIDTH = 0.3
"""Of the sigmoid, in units of scores, whose variance is 1 as gates are fitted."""
MUCH = 0.1
"""Least share of the rest in what is seen that a key is weighed against."""


class Chosen(NamedTuple):
    """What the gates of a layer chose in whole sequences.

    Attributes:
        rules: of the KV heads, in numpy.
        turnovers: of each row and KV head; None where its rule selects nothing.
        scores: how attention makes its scores.
    """

    rules: RuleTable
    turnovers: Sequence[Sequence[Turnover | None]]
    scores: Scores


class _ToScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor, gate_scores: Tensor, query: Tensor, key: Tensor, value: Tensor, chosen: Chosen
    ) -> Tensor:
        ctx.save_for_backward(out, gate_scores, query, key, value)
        ctx.chosen = chosen
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], score_gradients(grads[0], ctx.chosen, *ctx.saved_tensors), None, None, None, None


def with_gate_gradients(
    out: Tensor, gate_scores: Tensor, query: Tensor, key: Tensor, value: Tensor, chosen: Chosen
) -> Tensor:
    """Returns `out`, whose gradient also reaches what gates score.

    Args:
        out: attention of whole sequences without padding, `[rows, heads, tokens, value_dim]`.
        gate_scores: of the tokens, not rounded, `[rows, kv_heads, tokens]`.
        query: what attended, `[rows, heads, tokens, head_dim]`.
        key: `[rows, kv_heads, tokens, head_dim]`, as it is kept.
        value: `[rows, kv_heads, tokens, value_dim]`, likewise.
        chosen: what gates chose.
    """
    found = _ToScores.apply(out, gate_scores, query.detach(), key.detach(), value.detach(), chosen)  # type: ignore[no-untyped-call]
    assert isinstance(found, Tensor)
    return found


def score_gradients(
    grad: Tensor, chosen: Chosen, out: Tensor, gate_scores: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Returns the gradient of a loss in what gates score, `[rows, kv_heads, tokens]`.

    Args:
        grad: of the loss in `out`, `[rows, heads, tokens, value_dim]`.
        chosen: see `with_gate_gradients`, as the rest.
        out: likewise.
        gate_scores: likewise.
        query: likewise.
        key: likewise.
        value: likewise.
    """
    rows, kv_heads, tokens, _ = key.shape
    grouped = [each.reshape(rows, kv_heads, -1, tokens, each.shape[-1]) for each in (grad, out, query)]
    found, left = torch.zeros_like(gate_scores), chosen.rules.tokens_left(1 + np.arange(tokens))
    for row in range(rows):
        for head in range(kv_heads):
            made = chosen.turnovers[row][head]
            if made is None:
                continue
            parts = (each[row, head].float() for each in (*grouped, key, value))
            span = Span(*chosen.rules.columns[: len(Span._fields), head].tolist())
            logits = chosen.scores.sink_logits
            own = None if logits is None else logits.view(kv_heads, -1)[head].float()
            competing = _Competing.of(gate_scores[row, head], made, left[:, head], span)
            found[row, head] = _of_head(
                *parts, competing=competing, span=span, scores=chosen.scores._replace(sink_logits=own)
            )
    return found


class _Competing(NamedTuple):
    """The tokens of one row and KV head that leave the window in its time, in their order.

    Attributes:
        scores: of them, `[leaving]`.
        entered: how many have left when each does, int64 `[leaving]`.
        gone: how many have when it is kept no longer.
        left: how many have left when each query attends, int64 `[tokens]`.
        first: position of the first of them.
    """

    scores: Tensor
    entered: Tensor
    gone: Tensor
    left: Tensor
    first: int

    @staticmethod
    def of(gate_scores: Tensor, made: Turnover, left: Ints, span: Span) -> _Competing:
        """Returns them from what the gate scores of all tokens, `[tokens]`."""
        entered, gone, left_here = (
            torch.from_numpy(np.ascontiguousarray(each, np.int64)).to(gate_scores.device)
            for each in (made.entered, made.gone, left)
        )
        return _Competing(
            gate_scores[span.sink : span.sink + len(entered)].float(), entered, gone, left_here, span.sink
        )


def _of_head(
    grad: Tensor,
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    competing: _Competing,
    span: Span,
    scores: Scores,
) -> Tensor:
    """`score_gradients` of one row and KV head; `grad`, `out` and `query` are `[group, tokens, ...]`, the result `[tokens]`."""
    tokens, first, leaving = len(key), competing.first, len(competing.scores)
    found, positions = key.new_zeros(tokens), torch.arange(tokens, device=key.device)
    for begin in range(0, tokens, TILE):
        rows = slice(begin, min(begin + TILE, tokens))
        left = competing.left[rows, None]
        if not bool(left.any()):
            continue
        there = competing.entered <= left
        kept = there & (left < competing.gone)
        visible = visible_keys(positions[rows, None] + 1, positions, span)
        visible[:, first : first + leaving] |= kept
        raw = query[:, rows] @ key.T * scores.scaling
        raw = torch.tanh(raw / scores.softcap) * scores.softcap if scores.softcap else raw
        lse = raw.masked_fill(~visible, -torch.inf).logsumexp(-1)
        if scores.sink_logits is not None:
            lse = torch.logaddexp(lse, scores.sink_logits[:, None].expand_as(lse))
        at = slice(first, first + leaving)
        share = (raw[..., at] - torch.where(kept, lse[..., None], torch.logaddexp(lse[..., None], raw[..., at]))).exp()
        gained = share / torch.where(kept, (1 - share).clamp_min(MUCH), 1.0)
        change = grad[:, rows] @ value[at].T - (grad[:, rows] * out[:, rows]).sum(-1, keepdim=True)
        change = (gained * change).sum(0)
        found[at] += _moved(change, competing.scores, there, kept)
    return found


def _moved(change: Tensor, scores: Tensor, there: Tensor, kept: Tensor) -> Tensor:
    """Returns the gradient in scores, `[leaving]`, from that in what is seen, `[queries, leaving]`."""
    least = scores.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
    best = scores.masked_fill(~there | kept, -torch.inf).amax(-1, keepdim=True)
    contested = least.isfinite() & best.isfinite()
    bound = torch.where(contested, (least + best) / 2, torch.zeros_like(least))
    near = torch.sigmoid((scores - bound) / WIDTH)
    steep = (near * (1 - near) / WIDTH).masked_fill(~(there & contested), 0)
    mean = (change * steep).sum(-1, keepdim=True) / steep.sum(-1, keepdim=True).clamp_min(1e-20)
    return ((change - mean) * steep).sum(0)
