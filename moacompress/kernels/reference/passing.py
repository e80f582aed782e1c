"""Attention over the tokens that gates keep for a while in a chunk, in plain PyTorch.

Every one is seen by the queries between its entry and its end, one tile of them at a time, so that the work follows what is
kept and not what there was. Softmax over them and over what rules show is a mean of the two outputs, weighted by their
denominators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moacompress.core.arrays import Ints
from moacompress.core.errors import UnsupportedError
from moacompress.kernels.arguments import CacheView, Passing, Scores
from moacompress.kernels.halves import BlockHalf, read_tokens
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

    Args:
        base: over one of them, where every query sees something, or nothing in either.
        more: over the other; where a query sees nothing there, the log of its denominator is -inf.
    """
    (out, lse), (other, other_lse) = base, more
    peak = torch.maximum(lse, other_lse).detach().clamp_min(torch.finfo(lse.dtype).min)
    ours, theirs = (torch.exp(each - peak)[..., None] for each in (lse, other_lse))
    total = ours + theirs
    whole = (out.to(ours.dtype) * ours + other.to(ours.dtype) * theirs) / total
    nothing = other_lse.isneginf()
    return torch.where(nothing[..., None], out, whole.to(out.dtype)), torch.where(
        nothing, lse, peak + total[..., 0].log()
    )


class KeptTokens(NamedTuple):
    """Tokens of one row and KV head that a gate keeps for a while.

    Attributes:
        keys: `[tokens, head_dim]`.
        values: `[tokens, value_dim]`.
        entered: how many have left the window when each comes to be kept, int64 `[tokens]`.
        gone: how many have when it is kept no longer.
    """

    keys: Tensor
    values: Tensor
    entered: Tensor
    gone: Tensor


def kept_tokens(
    passing: Passing, key: Tensor, value: Tensor, cache: CacheView, rules: RuleTable
) -> list[list[KeptTokens | None]]:
    """Returns them by row and KV head, as queries see them.

    Args:
        passing: which they are.
        key: of the chunk, each row's real tokens first, `[rows, kv_heads, tokens, head_dim]`.
        value: likewise, `[rows, kv_heads, tokens, value_dim]`.
        cache: pool and table.
        rules: of the KV heads.

    Raises:
        UnsupportedError: a block is not in the pool in these formats.
    """
    begins, codes = passing.begins.tolist(), rules.format_codes

    def of_head(row: int, head: int) -> KeptTokens | None:
        at = slice(*begins[row * key.shape[1] + head :][:2])
        slots = passing.slots[at].to(key.device)
        if not len(slots):
            return None
        cached, sides = slots >= 0, []
        for number, (side, segments) in enumerate(((key, cache.keys), (value, cache.values))):
            own, code = side[row, head], int(codes[number, head])
            wide = torch.promote_types(own.dtype, torch.float32) if code else own.dtype
            found = own.new_empty(len(slots), own.shape[-1], dtype=wide)
            if bool(cached.any()):
                half = BlockHalf(code, own.shape[-1], own.dtype, values=number == 1)
                ids = torch.div(slots[cached], BLOCK, rounding_mode="floor")
                there = read_tokens(segments, half, ids[None, None], slots[cached] % BLOCK)
                if there is None:
                    raise UnsupportedError("a block of a token that a gate keeps is not in the pool")
                found = found.index_put((cached,), there[0, 0].to(wide))
            fresh = own[-1 - slots[~cached]]
            if code:
                fresh = rounded(fresh[None, None], [code])[0, 0].to(wide)
            sides.append(found.index_put((~cached,), fresh))
        keys, values = sides
        return KeptTokens(keys, values, passing.entered[at].to(key.device), passing.gone[at].to(key.device))

    return [[of_head(row, head) for head in range(key.shape[1])] for row in range(len(key))]


def tokens_left(past: Tensor, valid: Tensor, rules: RuleTable) -> list[Ints]:
    """Returns of each row how many tokens have left the windows when a query attends, int64 `[real tokens, kv_heads]`.

    Args:
        past: tokens before the chunk, int64 `[rows]`.
        valid: real tokens of it, likewise.
        rules: of the KV heads.
    """
    numbers = RuleTable(np.asarray(rules.columns))
    return [
        numbers.tokens_left(before + 1 + np.arange(count))
        for before, count in zip(past.tolist(), valid.tolist(), strict=True)
    ]


def attend_passing(
    query: Tensor, kept: Sequence[Sequence[KeptTokens | None]], left: Sequence[Ints], scores: Scores, value_dim: int
) -> PartOfSoftmax:
    """Attention of queries over tokens that gates keep for a while.

    Args:
        query: each row's real ones first, `[rows, heads, tokens, head_dim]`.
        kept: the tokens, by row and KV head.
        left: of each row how many tokens have left the windows when a query attends, int64 `[real tokens, kv_heads]`.
        scores: how scores are made; learned logits are no part of this.
        value_dim: numbers of a value.

    Returns:
        `[rows, heads, tokens, value_dim]`, and `[rows, heads, tokens]` in float32 at least, -inf where nothing is seen.
    """
    rows, heads, tokens, size = query.shape
    kv_heads = len(kept[0])
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    asking, plain = query.view(rows, kv_heads, -1, tokens, size), scores._replace(sink_logits=None)
    outs, denominators = [], []
    for row in range(rows):
        for head in range(kv_heads):
            found = _passing(asking[row, head], kept[row][head], left[row][:, head], plain, value_dim, wide)
            outs.append(found[0])
            denominators.append(found[1])
    out, lse = (
        torch.stack(outs).view(rows, heads, tokens, value_dim),
        torch.stack(denominators).view(rows, heads, tokens),
    )
    return out, lse


def _passing(
    query: Tensor, kept: KeptTokens | None, left: Ints, scores: Scores, value_dim: int, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`attend_passing` of one row and KV head, `query` `[group, tokens, head_dim]`."""
    group, tokens, _ = query.shape
    outs, denominators = [], []
    now = torch.from_numpy(left).to(query.device)
    for first in range(0, tokens, TILE):
        size, here = min(TILE, tokens - first), now[first : first + TILE]
        at = None
        if kept is not None and len(here):
            at = torch.nonzero((kept.entered <= here[-1]) & (kept.gone > here[0]))[:, 0]
        if kept is None or at is None or not len(at):
            outs.append(query.new_zeros(group, size, value_dim))
            denominators.append(torch.full((group, size), -torch.inf, dtype=wide, device=query.device))
            continue
        visible = (kept.entered[at] <= here[:, None]) & (here[:, None] < kept.gone[at])
        visible = torch.nn.functional.pad(visible, (0, 0, 0, size - len(here)))  # what is padding sees nothing
        none = ~visible.any(-1)
        visible[:, 0] |= none  # a softmax of nothing has no gradient
        out, lse = attend(
            query[None, None, :, first : first + size],
            kept.keys[at][None, None],
            kept.values[at][None, None],
            visible,
            scores,
            with_lse=True,
        )
        outs.append(out[0, 0].masked_fill(none[:, None], 0))
        denominators.append(lse[0, 0].masked_fill(none, -torch.inf))
    return torch.cat(outs, 1), torch.cat(denominators, 1)
