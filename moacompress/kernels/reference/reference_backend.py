"""The reference as a backend: rows of equal length and KV heads of equal rules are attended to together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from moacompress.core.errors import UnsupportedError
from moacompress.kernels.arguments import CacheView, Scores, TransientTokens
from moacompress.kernels.backend import Backend
from moacompress.kernels.capabilities import Capabilities, Status
from moacompress.kernels.kv_format import check_codes
from moacompress.kernels.kv_parts import KVPart, read_tokens
from moacompress.kernels.reference.rounding import rounded
from moacompress.kernels.reference.tiled import Keys, sparse_attention
from moacompress.kernels.reference.transient import attend_transient, merged
from moacompress.rules.formats import all_formats
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import BLOCK, Span, visible_intervals


class ReferenceBackend(Backend):
    """Plain PyTorch, on any device and dtype."""

    name = "reference"
    capabilities = Capabilities(prefill_gradients=True, cached_gradients=True, outside_formats=True)

    def status(self) -> Status:
        """Says that it works, as it always does."""
        return Status(True, "plain PyTorch is always there")

    def supports(self, device: str, dtype: torch.dtype) -> bool:
        """Returns True: it runs on every device, in every dtype."""
        return True

    def decode(
        self,
        query: torch.Tensor,
        *,
        cache: CacheView,
        lengths: torch.Tensor,
        rules: RuleTable,
        scores: Scores,
        with_lse: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns `[rows, heads, value_dim]`: the tokens that rules show are gathered, then attended to by torch."""
        out, lse = _attend(query[:, :, None], None, cache, lengths, (lengths > 0).long(), rules, scores, with_lse)
        return out[:, :, 0], None if lse is None else lse[:, :, 0]

    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        cache: CacheView,
        past: torch.Tensor,
        valid: torch.Tensor,
        rules: RuleTable,
        scores: Scores,
        with_lse: bool = False,
        transient: TransientTokens | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns `[batch, heads, tokens, value_dim]`, one row and KV head after the other."""
        wanted = with_lse or transient is not None
        out, lse = _attend(query, (key, value), cache, past, valid, rules, scores, wanted)
        if transient is None or lse is None:
            return out, lse
        more = attend_transient(
            query, key, value, cache=cache, past=past, valid=valid, rules=rules, scores=scores, transient=transient
        )
        return merged((out, lse), more)


def _attend(
    query: torch.Tensor,
    chunk: tuple[torch.Tensor, torch.Tensor] | None,
    cache: CacheView,
    past: torch.Tensor,
    valid: torch.Tensor,
    rules: RuleTable,
    scores: Scores,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of `valid` queries a row over the cache and, where there is one, over the chunk.

    Without a chunk a row's only query is the cache's last token, so that `past` counts it.
    """
    rows, heads, tokens, head_dim = query.shape
    kv_heads = cache.table.shape[1]
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, tokens, head_dim)
    value_dim = cache.size_of_values if chunk is None else chunk[1].shape[-1]
    wide = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(*grouped.shape[:-1], value_dim)
    lse = query.new_full(grouped.shape[:-1], float("-inf"), dtype=wide) if with_lse else None
    logits = None if scores.sink_logits is None else scores.sink_logits.view(kv_heads, -1)
    for own, before, count in _equal_rows(past, valid):
        for span, members in rules.groups():
            at = _places(own, members, query.device)
            codes = rules.format_codes[:, members[0]].tolist()
            check_codes(codes, members[0], [format.code for format in all_formats().values()])
            kv_parts = (
                KVPart(codes[0], head_dim, query.dtype),
                KVPart(codes[1], value_dim, query.dtype, values=True),
            )
            keys = _held(
                cache, kv_parts, own, members, before, span, seen=before + (chunk is not None), device=query.device
            )
            if chunk is not None:
                new = tuple(tensor[at][:, :, :count] for tensor in chunk)
                keys = _joined(keys, tuple(map(_as_kept, kv_parts, new)), before)
            assert keys is not None  # a query sees itself
            asking = grouped[at][:, :, :, :count]
            if any(codes):
                asking, keys = asking.to(wide), Keys(keys.keys.to(wide), keys.values.to(wide), keys.pieces)
            here = scores._replace(sink_logits=None if logits is None else logits[[*members]])
            n = before + (count if chunk is not None else 0)
            found = sparse_attention(asking, keys, n, span, here, with_lse=with_lse)
            found = (found[0].to(query.dtype), *found[1:])
            if len(own) == rows and len(members) == kv_heads and count == tokens:
                out, lse = found[0], found[1] if with_lse else None
                continue
            out[(*at, slice(None), slice(0, count))] = found[0]
            if lse is not None:
                lse[(*at, slice(None), slice(0, count))] = found[1]
    return out.view(rows, heads, tokens, value_dim), None if lse is None else lse.view(rows, heads, tokens)


def _equal_rows(past: torch.Tensor, valid: torch.Tensor) -> Iterator[tuple[list[int], int, int]]:
    """Yields the rows with equally many tokens before and in the chunk, and both numbers; rows without any are left out."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row, key in enumerate(zip(past.tolist(), valid.tolist(), strict=True)):
        groups.setdefault(key, []).append(row)
    for (before, count), rows in groups.items():
        if count:
            yield rows, before, count


def _places(rows: Sequence[int], heads: Sequence[int], device: torch.device) -> tuple[slice | torch.Tensor, ...]:
    """Returns an index of rows and KV heads in the first two dimensions; slices, which copy nothing, where that is possible."""
    runs = [len(numbers) == numbers[-1] - numbers[0] + 1 for numbers in (rows, heads)]
    slices = tuple(slice(numbers[0], numbers[-1] + 1) for numbers in (rows, heads))
    if all(runs):
        return slices
    row, head = (torch.tensor(numbers, device=device) for numbers in (rows, heads))
    return row[:, None], head


def _as_kept(kv_part: KVPart, x: torch.Tensor) -> torch.Tensor:
    """Returns a chunk's keys or values, `[rows, heads, tokens, dim]`, as they will be kept."""
    return rounded(x, [kv_part.code] * x.shape[1]) if kv_part.bits else x


def _held(
    cache: CacheView,
    kv_parts: tuple[KVPart, ...],
    rows: Sequence[int],
    heads: Sequence[int],
    past: int,
    span: Span,
    *,
    seen: int,
    device: torch.device,
) -> Keys | None:
    """Returns what is cached of the keys that queries from `seen - 1` on see, `[rows, heads, keys, dim]`; None if nothing.

    All `rows` have `past` tokens in the cache, and all `heads` share the span and the formats.

    Raises:
        UnsupportedError: a block is not in the table, or not in the pool in these formats.
    """
    (first, _), (start, _) = visible_intervals(seen, span)
    sinks = first, max(first, min(span.sink, start, past))  # those of later queries too
    pieces = [(low, high - low) for low, high in (sinks, (start, past)) if high > low]
    if not pieces:
        return None
    position = torch.cat([torch.arange(low, low + count, device="cpu") for low, count in pieces])
    blocks = position // BLOCK
    table = cache.table[list(rows)][:, list(heads)].long()
    known = blocks < table.shape[-1]
    ids = (
        table[:, :, blocks.clamp(max=max(table.shape[-1] - 1, 0))] if table.shape[-1] else table.new_full((1, 1, 1), -1)
    )
    there = bool(known.all()) and not bool((ids < 0).any())
    ids, place = ids.to(device), (position % BLOCK).to(device)
    keys, values = (
        read_tokens(segments, kv_part, ids, place) if there and segments else None
        for segments, kv_part in zip(cache[:2], kv_parts, strict=True)
    )
    if keys is None or values is None:
        raise UnsupportedError("a block that a query sees has no id of the pool in the table")
    return Keys(keys, values, pieces)


def _joined(held: Keys | None, chunk: tuple[torch.Tensor, ...], past: int) -> Keys:
    """Returns the cached keys and values followed by those of the chunk, which begins at the position `past`."""
    key, value = chunk
    own = past, key.shape[2]
    if held is None:
        return Keys(key, value, [own])
    return Keys(torch.cat((held.keys, key), 2), torch.cat((held.values, value), 2), [*held.pieces, own])
