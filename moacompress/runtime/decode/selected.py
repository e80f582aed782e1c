"""Attention over the tokens that gates keep, and how it is put together with that over sinks and windows.

Softmax over both is a mean of the two outputs, weighted by their denominators. A step reads the kept tokens' blocks with the
backend's `decode`, a KV head of a row at a time; in a chunk every token that is kept for a while is seen by the queries between
its entry and its end, one tile of them at a time, so that the work follows what is kept and not what there was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moacompress.core.arrays import Ints
from moacompress.kernels.backend import CacheView, Scores, as_tensors
from moacompress.kernels.dispatch import backend_with_gradients
from moacompress.kernels.halves import read_tokens
from moacompress.kernels.reference.rounding import rounded
from moacompress.kernels.reference.tiled import attend
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import BLOCK
from moacompress.runtime.cache.chosen_tokens import Selection, chosen_slots, window_slots
from moacompress.runtime.cache.layer_blocks import LayerBlocks

TILE = 256
"""Queries of a chunk that are worked on at a time."""

PartOfSoftmax = tuple[Tensor, Tensor]
"""Output, `[rows, heads, ..., value_dim]`, and the log of the softmax's denominator, `[rows, heads, ...]`."""


def merged(base: PartOfSoftmax, more: PartOfSoftmax) -> Tensor:
    """Returns attention over two sets of keys together, `[..., value_dim]` of the first output's dtype.

    Args:
        base: over one of them, where every query sees something, or nothing in either.
        more: over the other; where a query sees nothing there, the log of its denominator is -inf.
    """
    (out, lse), (other, other_lse) = base, more
    peak = torch.maximum(lse, other_lse).detach().clamp_min(torch.finfo(lse.dtype).min)
    ours, theirs = (torch.exp(each - peak)[..., None] for each in (lse, other_lse))
    whole = (out.to(ours.dtype) * ours + other.to(ours.dtype) * theirs) / (ours + theirs)
    return torch.where(other_lse.isneginf()[..., None], out, whole.to(out.dtype))


def attend_kept(query: Tensor, held: LayerBlocks, lengths: Ints, scores: Scores) -> PartOfSoftmax:
    """Attention of one query a row over the tokens that gates keep of it.

    Args:
        query: `[rows, heads, head_dim]`.
        held: the layer's blocks.
        lengths: tokens of the rows, `[rows]`; 0 for a row that is not asked for.
        scores: how scores are made; learned logits are no part of this.

    Returns:
        `[rows, heads, value_dim]`, and `[rows, heads]` in float32 at least.
    """
    rows, heads, size = query.shape
    rules, view = held.rules, held.view_chosen()
    group, counts = heads // len(rules), rules.selected(lengths)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_zeros(rows, len(rules), group, view.value_dim or held.pool.layout.value_dim)
    lse = torch.full((rows, len(rules), group), -torch.inf, dtype=wide, device=query.device)
    asking = query.view(rows, len(rules), group, size)
    codes = np.asarray(rules.format_codes).T
    for formats in np.unique(codes, axis=0):
        members = np.flatnonzero((codes == formats).all(axis=1))
        row, place = np.nonzero(counts[:, members] > 0)
        if not len(row):
            continue
        head = members[place]
        at = tuple(torch.from_numpy(numbers).to(query.device) for numbers in (row, head))
        table = view.table[row, head][:, None]
        full = RuleTable.of([Rule.FULL], 1)
        full.format_codes[:, 0] = formats
        few = asking[at]
        found, denominator = backend_with_gradients(few, *view.keys, *view.values, cached=True).decode(
            few,
            cache=CacheView(view.keys, view.values, table.contiguous(), view.value_dim),
            lengths=torch.from_numpy(counts[row, head].astype(np.int64)),
            rules=as_tensors(full),
            scores=scores._replace(sink_logits=None),
            with_lse=True,
        )
        assert denominator is not None
        out[at], lse[at] = found.to(out.dtype), denominator.to(wide)
    return out.view(rows, heads, -1), lse.view(rows, heads)


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
    selection: Selection,
    key: Tensor,
    value: Tensor,
    rules: RuleTable,
    before: Ints,
    held: LayerBlocks | None,
) -> list[list[KeptTokens | None]]:
    """Returns the tokens that gates keep for a while in a chunk, those of before it included, by row and KV head.

    Args:
        selection: what gates do in the chunk.
        key: of the chunk, each row's real tokens first, `[rows, kv_heads, tokens, head_dim]`.
        value: likewise, `[rows, kv_heads, tokens, value_dim]`.
        rules: in whose formats queries see them.
        before: tokens of the rows before it, `[rows]`.
        held: the layer's blocks, without the chunk; None where there is no cache.
    """
    codes = rules.format_codes

    def of_head(row: int, head: int) -> KeptTokens | None:
        made = selection.turnovers[row][head]
        if made is None or not len(ever := made.ever):
            return None
        old, new = ever[ever < made.kept_before], ever[ever >= made.kept_before]
        positions = selection.positions(head, new, made)
        fresh = torch.from_numpy(positions[positions >= before[row]] - before[row]).to(key.device)
        sides = zip((key, value), codes[:, head].tolist(), strict=True)
        parts = [tuple(_as_kept(side[row, head, fresh], code) for side, code in sides)]
        if held is not None and len(ever) > len(fresh):
            cached = positions[positions < before[row]]
            slots = np.concatenate(
                [chosen_slots(held, row, head, made.places[old]), window_slots(held, row, head, cached)]
            )
            parts.insert(
                0, tuple(old.to(own.dtype) for old, own in zip(read(held, head, slots), parts[0], strict=True))
            )
        keys, values = (torch.cat(part) for part in zip(*parts, strict=True))
        entered, gone = (torch.from_numpy(numbers[ever]).to(key.device) for numbers in (made.entered, made.gone))
        return KeptTokens(keys, values, entered, gone)

    return [[of_head(row, head) for head in range(key.shape[1])] for row in range(len(key))]


def _as_kept(tokens: Tensor, code: int) -> Tensor:
    """Returns keys or values, `[tokens, dim]`, as a format keeps them; the gradient passes straight through."""
    return rounded(tokens[None, None], [code])[0, 0] if code else tokens


def read(held: LayerBlocks, head: int, slots: Ints) -> tuple[Tensor, Tensor]:
    """Returns tokens of the cache as queries see them, `[tokens, head_dim]` and `[tokens, value_dim]`."""
    pool, places = held.pool, torch.from_numpy(slots % BLOCK)
    ids = torch.from_numpy(slots // BLOCK)[None, None]
    halves = pool.layout.kinds[int(pool.layout.of_head[head])]
    found = [
        read_tokens(segments, half, ids.to(pool.device), places.to(pool.device))
        for segments, half in zip((pool.keys, pool.values), halves, strict=True)
    ]
    assert found[0] is not None
    assert found[1] is not None
    return found[0][0, 0], found[1][0, 0]


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
