"""Which program of a launch attends to what; worked out on the host, from lengths and rules."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from moacompress.core.arrays import Bools, Ints
from moacompress.core.errors import UnsupportedError
from moacompress.kernels.arguments import CacheView
from moacompress.kernels.kv_parts import KVPart
from moacompress.kernels.triton.tile_sizes import LARGEST
from moacompress.rules.formats import FORMAT_NAMES
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import BLOCK

UNIT = 16
"""Bytes that places of blocks count in."""
PROGRAMS = 512
"""How many programs a launch should have at least, where there is enough to do: a few for every processor of a large card."""
LONGEST = 64
"""Blocks of the longest stretch."""


WHOLE = LARGEST // BLOCK
"""Blocks that stretches are multiples of: no tile is cut."""


class Launch(NamedTuple):
    """The KV heads of one pair of formats.

    Attributes:
        kv_parts: how they keep keys and values.
        work: see `decode_kernels.split`.
        chunk: blocks of a stretch.
    """

    kv_parts: tuple[KVPart, KVPart]
    work: Ints
    chunk: int


class WorkLists(NamedTuple):
    """A decode step.

    Attributes:
        launches: of each pair of formats one.
        begins: see `decode_kernels.merge`.
    """

    launches: Sequence[Launch]
    begins: Ints


def work_lists(
    cache: CacheView, lengths: Ints, rules: RuleTable, dtype: torch.dtype, head_dim: int, value_dim: int
) -> WorkLists:
    """Returns what a decode step's programs do: stretches of about equally many bytes.

    Args:
        cache: its table is checked.
        lengths: tokens of the rows, int64 `[rows]`.
        rules: of the KV heads, a numpy table.
        dtype: of native numbers.
        head_dim: numbers of a key.
        value_dim: numbers of a value.

    Raises:
        UnsupportedError: a visible block is not in the table, or not in the pool in its formats; or a format is not known.
    """
    keys, values = rules.format_codes.tolist()
    pairs = list(zip(keys, values, strict=True))
    for head, pair in enumerate(pairs):
        if not set(pair) <= set(FORMAT_NAMES):
            raise UnsupportedError(f"KV head {head} has the formats {[*pair]}; known are {[*FORMAT_NAMES]}")
    kinds = {
        pair: (KVPart(pair[0], head_dim, dtype), KVPart(pair[1], value_dim, dtype, values=True))
        for pair in sorted(set(pairs))
    }
    runs = rules.block_runs(lengths)
    blocks = (runs[:, 1] - runs[:, 0]).sum(0) * (lengths > 0)[:, None]
    _check(cache, runs, [kinds[pair] for pair in pairs], lengths)
    token_bytes = rules.token_bytes(head_dim, value_dim, str(dtype).removeprefix("torch."))
    longest = int(token_bytes.max()) * LONGEST
    share = max(1, min(longest, int((blocks * token_bytes).sum()) // PROGRAMS))
    chunks = np.maximum(1, -(-share // (token_bytes * WHOLE))) * WHOLE
    counts = -(-blocks // chunks)
    begins = np.concatenate(([0], counts.ravel().cumsum()))
    row, head = (part.ravel().repeat(counts.ravel()) for part in np.indices(counts.shape))
    place = np.arange(begins[-1])
    work = np.stack((row, head, place - begins[row * len(rules) + head], place), 1)
    launches = []
    for pair, kv_parts in kinds.items():
        mine = np.array([pair == other for other in pairs])
        launches.append(Launch(kv_parts, work[mine[head]], int(chunks[mine][0])))
    return WorkLists(launches, begins)


def _check(cache: CacheView, runs: Ints, kv_parts: Sequence[tuple[KVPart, KVPart]], lengths: Ints) -> None:
    """Refuses a table that lacks a visible block, or has one of another format."""
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
    parts = tuple((part.data_ptr(), len(part), part.stride(0) * part.element_size()) for part in segments)
    return _places(parts, base.data_ptr(), base.device)


@lru_cache(maxsize=512)
def _places(parts: tuple[tuple[int, int, int], ...], base: int, device: torch.device) -> torch.Tensor:
    found = np.concatenate([start - base + step * np.arange(blocks, dtype=np.int64) for start, blocks, step in parts])
    if (found % UNIT).any():
        raise UnsupportedError(f"blocks of a cache must lie whole multiples of {UNIT} bytes apart")
    return torch.from_numpy(found // UNIT).to(device)
