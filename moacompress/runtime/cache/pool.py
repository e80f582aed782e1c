"""The pool of cache blocks of one layer, and the ragged ranges of them that tables are worked on with.

A block holds 16 tokens of one KV head of one row. Which block holds what is said by a block table; a block that several
rows, beams or forks of a prefix have in their tables is counted, and never written again.
"""

from __future__ import annotations

import threading
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from moacompress.core.arrays import Ints
from moacompress.rules.windows import BLOCK

Ids: TypeAlias = npt.NDArray[np.int32]

SLACK = 8
"""A pool that must grow beyond what was reserved grows by at least 1/8, so that it is not done at every block."""
LEAST_GROWTH = 16
"""Smallest growth of a pool, blocks."""


class Table:
    """The block table of a layer.

    Args:
        rows: of the batch.
        heads: KV heads.

    Attributes:
        ids: `[rows, heads, logical blocks]`; -1 where there is no block.
    """

    def __init__(self, rows: int, heads: int) -> None:
        self.ids: Ids = np.full((rows, heads, 4), -1, np.int32)

    def widen(self, blocks: int) -> None:
        """Makes place for so many logical blocks."""
        rows, heads, width = self.ids.shape
        if blocks > width:
            more = np.full((rows, heads, max(blocks, 2 * width) - width), -1, np.int32)
            self.ids = np.concatenate([self.ids, more], axis=2)


class Pool:
    """Memory for the blocks of one layer: segments that stay where they are, so that growing moves nothing.

    Block ids count through the segments. Caches that were forked from each other share a pool; the lock makes taking and
    giving back blocks safe where they run in threads.

    Args:
        key: a tensor whose last dimension, dtype and device are those of the keys.
        value: the same for the values.

    Attributes:
        keys: segments `[blocks, 16, head_dim]`.
        values: segments `[blocks, 16, value_dim]`.
        refs: how many table entries name each block; 0 is free.
        shared: whether some block may be named more than once.
        lock: held while blocks are taken and given back.
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self._key, self._value = key.new_empty(0, BLOCK, key.shape[-1]), value.new_empty(0, BLOCK, value.shape[-1])
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.refs = np.zeros(0, np.int32)
        self.shared = False
        self.lock = threading.RLock()

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors that hold memory."""
        return [*self.keys, *self.values]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's keys and values."""
        return (
            self._key.new_empty(1, *self._key.shape[1:]).nbytes
            + self._value.new_empty(1, *self._value.shape[1:]).nbytes
        )

    @property
    def used(self) -> int:
        """Blocks that some table names."""
        return int(np.count_nonzero(self.refs))

    def reserve(self, blocks: int) -> None:
        """Adds a segment if the pool has fewer than `blocks` blocks."""
        missing = blocks - len(self.refs)
        if missing > 0:
            self.keys.append(self._key.new_empty(missing, *self._key.shape[1:]))
            self.values.append(self._value.new_empty(missing, *self._value.shape[1:]))
            self.refs = np.concatenate([self.refs, np.zeros(missing, np.int32)])

    def take(self, count: int) -> Ids:
        """Returns the ids of `count` free blocks, which are then named once each; grows where there are too few."""
        free = np.flatnonzero(self.refs == 0)
        if len(free) < count:
            self.grow(count - len(free))
            free = np.flatnonzero(self.refs == 0)
        taken = free[:count].astype(np.int32)
        self.refs[taken] = 1
        return taken

    def grow(self, missing: int) -> None:
        """Adds a segment of at least so many blocks."""
        size = len(self.refs)
        self.reserve(size + (max(missing, size // SLACK, LEAST_GROWTH) if size else missing))

    def retain(self, ids: Ids) -> None:
        """Counts every id (with repeats) once more; those below 0 are no blocks."""
        named = ids[ids >= 0]
        if len(named):
            np.add.at(self.refs, named, 1)
            self.shared = True

    def release(self, ids: Ids) -> None:
        """Counts every id (with repeats) once less; those below 0 are no blocks."""
        named = ids[ids >= 0]
        if not self.shared:
            self.refs[named] = 0
            return
        np.subtract.at(self.refs, named, 1)

    def copy(self, sources: Ids, targets: Ids) -> None:
        """Copies whole blocks."""
        for segments in (self.keys, self.values):
            for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
                block = self._block(segments, target)
                block.copy_(self._block(segments, source))

    def only(self, ids: Ids) -> tuple[Pool, Ids]:
        """Returns a pool with copies of some blocks and no others, each counted as often as it is named, and their ids in it.

        Args:
            ids: block ids of any shape; those below 0 are no blocks, and stay so.
        """
        pool, renumbered = Pool(self._key, self._value), ids.copy()
        named, renumbered[ids >= 0] = np.unique(ids[ids >= 0], return_inverse=True)
        if len(named):
            copies = self.gather(named[None, None])
            pool.keys, pool.values = ([copy.view(len(named), BLOCK, copy.shape[-1])] for copy in copies)
            pool.refs = np.bincount(renumbered[ids >= 0]).astype(np.int32)
            pool.shared = bool((pool.refs > 1).any())
        return pool, renumbered

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, refs=state["refs"].copy(), lock=threading.RLock())

    def write(self, slots: Ints, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes tokens.

        Args:
            slots: block id * 16 + place in the block, `[tokens]`.
            keys: `[tokens, head_dim]`.
            values: `[tokens, value_dim]`.
        """
        for segments, data in ((self.keys, keys), (self.values, values)):
            if len(segments) == 1:
                segments[0].view(-1, data.shape[-1])[self._index(slots)] = data
                continue
            for segment, picks, inside in self._split(segments, slots, BLOCK):
                segment.view(-1, data.shape[-1])[inside] = data[picks]

    def gather(self, ids: Ids) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns copies of blocks, joined along the tokens.

        Args:
            ids: block ids `[rows, heads, blocks]`.

        Returns:
            Keys `[rows, heads, blocks * 16, head_dim]` and values `[rows, heads, blocks * 16, value_dim]`.
        """
        found = []
        for segments in (self.keys, self.values):
            if len(segments) == 1:
                blocks = segments[0][self._index(ids)]
            else:
                flat = ids.reshape(-1).astype(np.int64)
                blocks = segments[0].new_empty(len(flat), *segments[0].shape[1:])
                for segment, picks, inside in self._split(segments, flat, 1):
                    blocks[picks] = segment[inside]
            found.append(blocks.view(*ids.shape[:2], ids.shape[2] * BLOCK, segments[0].shape[-1]))
        return found[0], found[1]

    def _split(
        self, segments: list[torch.Tensor], places: Ints, unit: int
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Returns for every segment that is met which of the places lie in it, and where there."""
        starts = np.cumsum([0, *(len(segment) * unit for segment in segments)])
        number = np.searchsorted(starts, places, side="right") - 1
        parts = []
        for at in np.unique(number).tolist():
            picks = np.flatnonzero(number == at)
            parts.append((segments[at], self._index(picks), self._index(places[picks] - starts[at])))
        return parts

    def _block(self, segments: list[torch.Tensor], number: int) -> torch.Tensor:
        for segment in segments:
            if number < len(segment):
                return segment[number]
            number -= len(segment)
        raise IndexError("no such block")

    def _index(self, numbers: npt.NDArray[np.integer]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(numbers, np.int64)).to(self._key.device)


def ragged_ranges(low: Ints, high: Ints) -> tuple[Ints, Ints]:
    """Returns the numbers of many ranges one after the other.

    Args:
        low: first number of each range, any shape.
        high: end of each range, of the same shape; a range whose end is not beyond its beginning is empty.

    Returns:
        `(owner, number)`, each `[sum of sizes]`: the flat index of the range, and the number.
    """
    low, high = low.reshape(-1), high.reshape(-1)
    sizes = np.maximum(high - low, 0)
    total = int(sizes.sum())
    owner = np.repeat(np.arange(len(low)), sizes)
    number = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes) + np.repeat(low, sizes)
    return owner, number
