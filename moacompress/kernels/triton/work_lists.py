"""Which program of a launch attends to what; worked out on the host, from lengths and rules."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from moacompress.core.arrays import Bools, Ints, ragged_ranges
from moacompress.core.errors import UnsupportedError
from moacompress.kernels.arguments import CacheView
from moacompress.kernels.kv_format import check_codes
from moacompress.kernels.kv_parts import KVPart
from moacompress.kernels.triton.tile_sizes import LARGEST
from moacompress.rules.formats import FORMATS
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import BLOCK, whole_blocks

UNIT = 16
"""Bytes that places of blocks count in."""
ALIGNED = UNIT // 8
"""Integers of 64 bits in so many."""
PROGRAMS = 512
"""How many programs a launch should have at least, where there is enough to do: a few for every processor of a large card."""
LONGEST = 64
"""Blocks of the longest stretch."""
WHOLE = LARGEST // BLOCK
"""Blocks that stretches are multiples of: no tile is cut."""


Memory = tuple[torch.Tensor, torch.Tensor]
"""Where blocks are counted from, and where they lie from there on."""


class Launch(NamedTuple):
    """The KV heads of one pair of formats.

    Attributes:
        kv_parts: how they keep keys and values.
        work: see `decode_kernels.split`.
        chunk: blocks of a stretch.
        selected: work over selected tokens, where a row and KV head is a row of one KV head.
    """

    kv_parts: tuple[KVPart, KVPart]
    work: Ints
    chunk: int
    selected: Ints


class Kinds(NamedTuple):
    """The pairs of formats of a layer's KV heads.

    Attributes:
        pairs: how keys and values are kept, ascending by formats.
        number: of each KV head the number of its pair, int64 `[kv_heads]`.
    """

    pairs: Sequence[tuple[KVPart, KVPart]]
    number: Ints

    @property
    def of_head(self) -> list[tuple[KVPart, KVPart]]:
        """How each KV head keeps keys and values."""
        return [self.pairs[number] for number in self.number]


class WorkLists(NamedTuple):
    """A decode step.

    Attributes:
        launches: of each pair of formats one.
        begins: see `decode_kernels.merge`.
    """

    launches: Sequence[Launch]
    begins: Ints


def work_lists(
    cache: CacheView,
    lengths: Ints,
    rules: RuleTable,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    selected: tuple[CacheView, Ints] | None = None,
) -> WorkLists:
    """Returns what a decode step's programs do: stretches of about equally many bytes.

    `lengths` are int64 `[rows]`, `dtype` is that of native numbers. `selected` are the cache's selected tokens, and how many
    each row and KV head has, int64 `[rows, kv_heads]`.

    Raises:
        UnsupportedError: a visible block is not in the table, or not in the pool in its formats; or a format is not known.
    """
    kinds = kinds_of(rules, head_dim, value_dim, dtype)
    runs = rules.block_runs(lengths)
    blocks = (runs[:, 1] - runs[:, 0]).sum(0) * (lengths > 0)[:, None]
    check_table(cache, runs, kinds.of_head, lengths)
    more = np.zeros_like(blocks)
    if selected is not None:
        more = whole_blocks(selected[1]) // BLOCK
        check_table(selected[0], np.stack((np.zeros_like(more), more))[None], kinds.of_head, lengths)
    token_bytes = rules.token_bytes(head_dim, value_dim, str(dtype).removeprefix("torch."))
    chunks, work, selected_work, begins = shares(blocks, more, token_bytes)
    launches = []
    for number, kv_parts in enumerate(kinds.pairs):
        mine = kinds.number == number
        picked = selected_work[mine[selected_work[:, 0] % len(rules)]]
        launches.append(Launch(kv_parts, work[mine[work[:, 1]]], int(chunks[mine][0]), picked))
    return WorkLists(launches, begins)


def shares(blocks: Ints, more: Ints, token_bytes: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Shares out blocks among programs: stretches of about equally many bytes.

    `blocks` are those of sinks and windows and `more` those of selected tokens, `[rows, kv_heads]`; `token_bytes` are those of
    a token of each KV head.

    Returns:
        Blocks of a stretch of each KV head; the work over windows and that over selected tokens, see `decode_kernels.split`, of
        which the second has a row and KV head as a row of one; and where results begin, see `decode_kernels.merge`.
    """
    longest = int(token_bytes.max()) * LONGEST
    share = max(1, min(longest, int(((blocks + more) * token_bytes).sum()) // PROGRAMS))
    chunks = np.maximum(1, -(-share // (token_bytes * WHOLE))) * WHOLE
    counts, more = -(-blocks // chunks), -(-more // chunks)
    begins = np.concatenate(([0], (counts + more).ravel().cumsum()))
    owner, *stretches = _stretches(counts, begins[:-1])
    of_selected, *others = _stretches(more, begins[:-1] + counts.ravel())
    work = np.stack((*np.divmod(owner, len(token_bytes)), *stretches), 1)
    return chunks, work, np.stack((of_selected, np.zeros_like(of_selected), *others), 1), begins


def _stretches(counts: Ints, first: Ints) -> tuple[Ints, Ints, Ints]:
    """Returns of every stretch its row and KV head as one number, which of theirs it is, and the place of its result.

    `counts` are stretches, `[rows, kv_heads]`; `first` is the place of the first result of each, `[rows * kv_heads]`.
    """
    sizes = counts.reshape(-1)
    owner, number = ragged_ranges(np.zeros_like(sizes), sizes)
    return owner, number, first[owner] + number


def kinds_of(rules: RuleTable, head_dim: int, value_dim: int, dtype: torch.dtype) -> Kinds:
    """Returns the pairs of formats of KV heads; `dtype` is that of native numbers.

    Raises:
        UnsupportedError: a format is not known.
    """
    keys, values = rules.format_codes.tolist()
    pairs = list(zip(keys, values, strict=True))
    for head, pair in enumerate(pairs):
        check_codes(pair, head, [format.code for format in FORMATS.values()])
    found = sorted(set(pairs))
    parts = [(KVPart(key, head_dim, dtype), KVPart(value, value_dim, dtype, values=True)) for key, value in found]
    return Kinds(parts, np.array([found.index(pair) for pair in pairs], np.int64))


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Returns integers on a device, int64 of the arrays' shapes; they go there together.

    Each begins at a multiple of `UNIT` bytes, whatever the sizes: Triton compiles a kernel for that and for its opposite.
    """
    sizes = [-(-each.size // ALIGNED) * ALIGNED for each in arrays]
    begins = np.cumsum([0, *sizes]).tolist()
    together = np.zeros(begins[-1], np.int64)
    for begin, each in zip(begins, arrays, strict=False):
        together[begin : begin + each.size] = each.ravel()
    on_device = torch.from_numpy(together).to(device)
    return [on_device[begin : begin + each.size].view(each.shape) for begin, each in zip(begins, arrays, strict=False)]


def check_table(cache: CacheView, runs: Ints, kv_parts: Sequence[tuple[KVPart, KVPart]], lengths: Ints) -> None:
    """Refuses a table that lacks a visible block, or has one of another format.

    `runs` are the begins and ends of visible blocks, int64 `[any, 2, rows, kv_heads]`; `kv_parts` those of each KV head;
    `lengths` the cached tokens that are asked for, int64 `[rows]`: of a row with 0 nothing is.

    Raises:
        UnsupportedError: there is such a block.
    """
    table = cache.table.numpy()
    width = table.shape[-1]
    there = lengths[:, None] > 0
    index = np.arange(width)
    seen = np.zeros(table.shape, bool)
    for begin, end in runs:
        seen |= (index >= begin[..., None]) & (index < end[..., None]) & there[..., None]
    ends = np.array([0, *(len(segment) for segment in cache.keys)]).cumsum()
    fits = np.array(
        [
            [part[0].fits(key) and part[1].fits(value) for key, value in zip(*cache[:2], strict=True)]
            for part in kv_parts
        ],
        bool,
    ).reshape(len(kv_parts), len(cache.keys))
    ids = table[seen]
    segment = np.searchsorted(ends, ids, "right") - 1
    heads = np.nonzero(seen)[1]
    inside = (ids >= 0) & (ids < ends[-1])
    short = bool(((runs[:, 1].max(0) > width) & there).any())
    if short or not inside.all() or not fits[heads, segment.clip(0, max(len(cache.keys) - 1, 0))].all():
        raise UnsupportedError("a block that a query sees has no id of the pool in the table")


def lie_in(segments: Sequence[torch.Tensor], kv_part: KVPart, ids: Ints) -> Bools:
    """Returns which blocks are in segments of a format, bool of the shape of `ids`."""
    ends = np.array([0, *(len(segment) for segment in segments)]).cumsum()
    fits = np.array([False, *(kv_part.fits(segment) for segment in segments), False])
    return np.asarray(fits[np.searchsorted(ends, ids, "right")])


def first_of(segments: Sequence[torch.Tensor], kv_part: KVPart) -> torch.Tensor:
    """Returns the first segment with blocks in a format; places count from there."""
    return next(segment for segment in segments if len(segment) and kv_part.fits(segment))


def block_places(segments: Sequence[torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    """Returns where every block of a pool lies, from a segment on, in units of 16 bytes, int64 `[blocks]` on its device.

    Raises:
        UnsupportedError: a block lies between those units.
    """
    parts = tuple(
        (part.data_ptr(), len(part), part.stride(0) * part.element_size())
        if part.numel()
        else (base.data_ptr(), len(part), 0)
        for part in segments
    )
    return _places(parts, base.data_ptr(), base.device)


def memory_of(segments: Sequence[torch.Tensor], kv_part: KVPart) -> Memory:
    """Returns where the blocks of a pool lie, counted from the first one of a format."""
    base = first_of(segments, kv_part)
    return base, block_places(segments, base)


@lru_cache(maxsize=512)
def _places(parts: tuple[tuple[int, int, int], ...], base: int, device: torch.device) -> torch.Tensor:
    found = np.concatenate([start - base + step * np.arange(blocks, dtype=np.int64) for start, blocks, step in parts])
    if (found % UNIT).any():
        raise UnsupportedError(f"blocks of a cache must lie whole multiples of {UNIT} bytes apart")
    return torch.from_numpy(found // UNIT).to(device)
