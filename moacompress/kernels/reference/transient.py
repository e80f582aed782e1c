"""Attention over the selected tokens of a chunk, in plain PyTorch.

Every one is seen by the queries between its admission and its eviction, one tile of them at a time, so that the work follows
what is selected and not what there was. Softmax over them and over what rules show is a mean of the two outputs, weighted by
their denominators.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from moacompress.core.errors import UnsupportedError
from moacompress.kernels.arguments import CacheView, Scores, TransientTokens
from moacompress.kernels.kv_parts import KVPart, read_tokens
from moacompress.kernels.reference.nonfinite import attend_as_seen
from moacompress.kernels.reference.rounding import rounded
from moacompress.kernels.reference.tiled import attend
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import BLOCK

TILE = 256
"""Queries of a chunk that are worked on at a time."""

PartOfSoftmax = tuple[Tensor, Tensor]
"""Output, `[rows, heads, ..., value_dim]`, and the log of the softmax's denominator, `[rows, heads, ...]`."""


def merged(base: PartOfSoftmax, more: PartOfSoftmax) -> PartOfSoftmax:
    """Returns attention over two sets of keys together, `[..., value_dim]` of the first output's dtype, and its denominator.

    In `base` every query sees something, or nothing in either; scores of -inf alone have no weight. Where a query sees nothing
    in `more`, the log of its denominator is -inf.
    """
    (out, lse), (other, other_lse) = base, more
    peak = torch.maximum(lse, other_lse).detach().clamp_min(torch.finfo(lse.dtype).min)
    ours, theirs = (torch.exp(each - peak)[..., None] for each in (lse, other_lse))
    total = ours + theirs
    nothing = other_lse.isneginf()
    seen = out.masked_fill((lse.isneginf() & ~nothing)[..., None], 0)  # scores of -inf alone make NaN
    whole = (seen.to(ours.dtype) * ours + other.to(ours.dtype) * theirs) / total
    return torch.where(nothing[..., None], out, whole.to(out.dtype)), torch.where(
        nothing, lse, peak + total[..., 0].log()
    )


def attend_transient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cache: CacheView,
    past: Tensor,
    valid: Tensor,
    rules: RuleTable,
    scores: Scores,
    transient: TransientTokens,
) -> PartOfSoftmax:
    """Attention of a chunk's queries over selected tokens: outputs, and logs of denominators, -inf where nothing is seen.

    Arguments are those of `Backend.prefill`, but each row's real queries come first, and its keys and values may be more.
    Learned logits are no part of this.

    Raises:
        UnsupportedError: a block is not in the pool in these formats.
    """
    rows, heads, tokens, size = query.shape
    kv_heads, numbers = key.shape[1], RuleTable(np.asarray(rules.columns))
    asking, plain = query.view(rows, kv_heads, -1, tokens, size), scores._replace(sink_logits=None)
    outs, denominators = [], []
    for row, (before, count) in enumerate(zip(past.tolist(), valid.tolist(), strict=True)):
        now = torch.from_numpy(numbers.tokens_left(before + 1 + np.arange(count))).to(query.device)
        for head, codes in enumerate(rules.format_codes.T.tolist()):
            at = slice(*transient.begins[row * kv_heads + head :][:2].tolist())
            slots, admitted, evicted = (part[at].to(query.device) for part in transient[1:])
            keys, values = (
                _vectors(slots, KVPart(code, own.shape[-1], own.dtype, values=own is value), own[row, head], segments)
                for code, own, segments in zip(codes, (key, value), (cache.keys, cache.values), strict=True)
            )
            found = _attend(asking[row, head], (keys, values), (admitted, evicted), now[:, head], plain)
            outs.append(found[0])
            denominators.append(found[1])
    return torch.stack(outs).view(rows, heads, tokens, -1), torch.stack(denominators).view(rows, heads, tokens)


def _vectors(slots: Tensor, kv_part: KVPart, own: Tensor, segments: Sequence[Tensor]) -> Tensor:
    """Returns keys or values of tokens as queries see them, `[tokens, dim]`; `own` are the chunk's, `[any, dim]`."""
    cached, wide = slots >= 0, torch.promote_types(own.dtype, torch.float32) if kv_part.code else own.dtype
    found = own.new_empty(len(slots), own.shape[-1], dtype=wide)
    if bool(cached.any()):
        ids = torch.div(slots[cached], BLOCK, rounding_mode="floor")
        there = read_tokens(segments, kv_part, ids[None, None], slots[cached] % BLOCK)
        if there is None:
            raise UnsupportedError("a block of a selected token is not in the pool")
        found = found.index_put((cached,), there[0, 0].to(wide))
    fresh = own[-1 - slots[~cached]]
    if kv_part.code:
        fresh = rounded(fresh[None, None], [kv_part.code])[0, 0].to(wide)
    return found.index_put((~cached,), fresh)


def _attend(
    query: Tensor, vectors: tuple[Tensor, Tensor], times: tuple[Tensor, Tensor], now: Tensor, scores: Scores
) -> tuple[Tensor, Tensor]:
    """`attend_transient` of one row and KV head; what is not finite reaches the queries that see it, and no others.

    The query is `[group, tokens, head_dim]`, keys and values are `[selected, dim]`; `times` says when each is admitted and
    evicted, int64 `[selected]`, and `now` the number of tokens evicted from the window when each real query attends, int64
    `[real tokens]`.
    """
    group, tokens, _ = query.shape
    (keys, values), (admitted, evicted) = vectors, times
    wide = torch.promote_types(query.dtype, torch.float32)
    outs, denominators = [], []
    for first in range(0, tokens, TILE):
        size, here = min(TILE, tokens - first), now[first : first + TILE]
        at = torch.nonzero((admitted <= here[-1]) & (evicted > here[0]))[:, 0] if len(here) else here
        if not len(at):
            outs.append(query.new_zeros(group, size, values.shape[-1]))
            denominators.append(torch.full((group, size), -torch.inf, dtype=wide, device=query.device))
            continue
        visible = (admitted[at] <= here[:, None]) & (here[:, None] < evicted[at])
        visible = torch.nn.functional.pad(visible, (0, 0, 0, size - len(here)))  # what is padding sees nothing
        none = ~visible.any(-1)
        something = visible.clone()
        something[:, 0] |= none  # a softmax of nothing has no gradient
        out, lse = attend_as_seen(
            partial(attend, visible=something, scores=scores, with_lse=True),
            partial(attend, visible=None, scores=scores, with_lse=True),
            query[None, None, :, first : first + size],
            keys[at][None, None],
            values[at][None, None],
            visible.__getitem__,
        )
        outs.append(out[0, 0].masked_fill(none[:, None], 0))
        denominators.append(lse[0, 0].masked_fill(none, -torch.inf))
    return torch.cat(outs, 1), torch.cat(denominators, 1)
