"""Attention of whole rows with gradients, in Triton: forward as of prompts, backward by `gradient_kernels`.

What is cached, or selected by gates, has its gradients in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from moacompress.core.arrays import Ints
from moacompress.kernels.arguments import CacheView, Scores
from moacompress.kernels.triton import gradient_kernels
from moacompress.kernels.triton.cards import card_of
from moacompress.kernels.triton.prefill import attend_chunk
from moacompress.kernels.triton.tile_sizes import gradient_constants
from moacompress.kernels.triton.work_lists import sent
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import visible_intervals

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def attend_whole(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    valid: torch.Tensor,
    rules: RuleTable,
    scores: Scores,
    wide: bool,
    again: Attention,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what `attend_chunk` does for rows without a past, with gradients for tensors and learned logits.

    Args:
        query: `[rows, heads, tokens, head_dim]`.
        key: `[rows, kv_heads, tokens, head_dim]`.
        value: `[rows, kv_heads, tokens, value_dim]`.
        valid: real tokens of each row, int64 `[rows]` on the CPU.
        rules: a numpy table without formats.
        scores: how scores are made.
        wide: whether products are in float32.
        again: the same attention in plain PyTorch, of query, key, value and learned logits. It makes the gradients where a
            number is not finite: those of the kernels would reach tokens that do not see it.
    """
    found: tuple[torch.Tensor, torch.Tensor] = _Attention.apply(  # type: ignore[no-untyped-call]
        query, key, value, scores.sink_logits, valid, rules, scores._replace(sink_logits=None), wide, again
    )
    return found


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sink_logits: torch.Tensor | None,
        valid: torch.Tensor,
        rules: RuleTable,
        scores: Scores,
        wide: bool,
        again: Attention,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = attend_chunk(
            query,
            key,
            value,
            cache=CacheView.empty(key),
            past=torch.zeros_like(valid),
            valid=valid,
            rules=rules,
            scores=scores._replace(sink_logits=sink_logits),
            passing=None,
            wide=wide,
        )
        ctx.save_for_backward(query, key, value, sink_logits, valid, out, lse)
        ctx.rest = rules, scores, wide
        ctx.again = again
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor, dlse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sink_logits, valid, out, lse = ctx.saved_tensors
        dout = dout.contiguous()
        delta = (dout.float() * out.float()).sum(-1) - dlse
        found = _gradients((query, key, value), dout, (lse, delta), valid, *ctx.rest)
        logits = None
        if sink_logits is not None:
            taken = torch.where(lse == float("-inf"), 0, torch.exp(sink_logits.float()[:, None] - lse) * delta)
            logits = -taken.sum((0, 2)).to(sink_logits.dtype)
        if not all(bool(part.isfinite().all()) for part in found):
            found, logits = _again(ctx.again, (query, key, value, sink_logits), (dout, dlse))
        return *found, logits, *[None] * 5


def _gradients(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cotangent: torch.Tensor,
    of_softmax: tuple[torch.Tensor, torch.Tensor],
    valid: torch.Tensor,
    rules: RuleTable,
    scores: Scores,
    wide: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of query, key and value.

    Args:
        tensors: these, as `attend_whole` takes them.
        cotangent: of the output, contiguous.
        of_softmax: `Lse` and `Delta` of `gradient_kernels.of_queries`.
        valid: see `attend_whole`.
        rules: likewise.
        scores: without learned logits, which the denominators hold.
        wide: see `attend_whole`.
    """
    query, key, value = (part if part.stride(3) == 1 else part.contiguous() for part in tensors)
    (rows, heads, tokens, head_dim), device = query.shape, query.device
    kv_heads, value_dim = key.shape[1], value.shape[3]
    tiles, constants = gradient_constants(
        heads // kv_heads,
        head_dim,
        value_dim,
        softcap=bool(scores.softcap),
        wide=wide,
        item_size=query.element_size(),
        card=card_of(device),
    )
    found = tuple(torch.empty(part.shape, dtype=part.dtype, device=device) for part in tensors)
    if not found[0].numel() or not found[2].numel():
        return found[0].zero_(), found[1].zero_(), found[2].zero_()
    columns = np.asarray(rules.columns)
    ends = _last_queries(columns.tobytes(), columns.shape, tokens, tiles.TILE)
    valids, table, last = sent((valid.numpy(), columns, ends), device)
    given = (query, key, value, cotangent, of_softmax[0], of_softmax[1].contiguous(), valids, table)
    numbers = (float(scores.scaling), float(scores.softcap), kv_heads, tokens)
    strides = query.stride()[:3] + key.stride()[:3] + value.stride()[:3]
    by_queries = (-(-tokens // int(constants["TOKENS"])), kv_heads, rows)
    gradient_kernels.of_queries[by_queries](*given, found[0], *numbers, *strides, **constants, **tiles.options)
    gradient_kernels.of_keys[(ends.shape[1], kv_heads, rows)](
        *given, last, *found[1:], *numbers, *strides, **constants, **tiles.options
    )
    return found[0], found[1], found[2]


def last_queries(rules: RuleTable, tokens: int, tile: int) -> Ints:
    """Returns how many queries there are up to the last that sees a key of a tile, int64 `[kv_heads, tiles]`.

    Windows never begin earlier for a later query, and what a native window hides stays hidden, so bisection finds them.

    Args:
        rules: a numpy table.
        tokens: of a row.
        tile: keys of a tile.
    """
    n = np.arange(1, tokens + 1)[:, None]
    (first, sink_end), (start, _) = visible_intervals(n, rules.span)
    begins = np.arange(0, tokens, tile)
    ends = np.minimum(begins + tile, tokens)
    found = []
    for head, sink in enumerate(rules.span.sink):
        firsts, sink_ends, starts = (
            np.broadcast_to(part, (tokens, len(rules)))[:, head] for part in (first, sink_end, start)
        )
        by_sinks = np.searchsorted(firsts, np.minimum(ends, sink))
        by_sinks = np.where(sink_ends[by_sinks - 1] > begins, by_sinks, 0)
        found.append(np.maximum(np.searchsorted(starts, ends), by_sinks))
    return np.stack(found)


@lru_cache(maxsize=64)
def _last_queries(columns: bytes, shape: tuple[int, ...], tokens: int, tile: int) -> Ints:
    return last_queries(RuleTable(np.frombuffer(columns, np.int64).reshape(shape)), tokens, tile)


def _again(
    attention: Attention, tensors: tuple[torch.Tensor | None, ...], cotangents: tuple[torch.Tensor, torch.Tensor]
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None]:
    """Returns the gradients of query, key and value, and of learned logits, by plain PyTorch."""
    with torch.enable_grad():
        leaves = [None if each is None else each.detach().requires_grad_() for each in tensors]
        results = attention(*leaves)
        found = torch.autograd.grad(results, [leaf for leaf in leaves if leaf is not None], cotangents)
    return (found[0], found[1], found[2]), found[3] if len(found) > 3 else None
