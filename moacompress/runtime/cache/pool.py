"""The pool of cache blocks of one layer, and the tables that say which block holds what.

A block holds 16 tokens of one KV head of one row. Which block holds what is said by a block table; a block that several
rows, beams or forks of a prefix have in their tables is counted, and never written again.
"""

from __future__ import annotations

import threading
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from moacompress.core.arrays import Ints
from moacompress.kernels.dispatch import backend_for
from moacompress.kernels.kv_parts import KVPart
from moacompress.rules.rule import SCORE_BYTES
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import BLOCK

Ids: TypeAlias = npt.NDArray[np.int32]

SharedFormats: TypeAlias = tuple[tuple[int, ...], ...]
"""Of each KV head the formats of the values that layers which share its keys keep beside its own; empty where none does."""
AT_ONCE = 8192
"""Tokens of a row to come for which memory is taken before they come, at most: few answers are longer, whatever was allowed."""
SLACK = 8
"""A pool that must grow beyond what was reserved grows by at least 1/8, so that it is not done at every block."""
LEAST_GROWTH = 4
"""Smallest growth of a pool, blocks."""


def reserved(reserve: int | None, there: int) -> int:
    """Returns for how many tokens of a row memory is taken at once.

    `reserve`: tokens that there may be in the end, or None.
    """
    return min(reserve or 0, there + AT_ONCE)


class Table:
    """The block table of a layer.

    Attributes:
        ids: `[rows, heads, logical blocks]`; -1 where there is no block.
    """

    def __init__(self, rows: int, heads: int) -> None:
        self.ids: Ids = np.full((rows, heads, 4), -1, np.int32)

    @staticmethod
    def of(ids: Ids) -> Table:
        """Returns a table with a copy of these ids, `[rows, heads, logical blocks]`."""
        table = Table(0, ids.shape[1])
        table.ids = ids.copy()
        return table

    def widen(self, blocks: int) -> None:
        """Makes place for so many logical blocks."""
        rows, heads, width = self.ids.shape
        if blocks > width:
            more = np.full((rows, heads, max(blocks, 2 * width) - width), -1, np.int32)
            self.ids = np.concatenate([self.ids, more], axis=2)

    def slots(self, rows: Any, heads: Any, numbers: Ints) -> Ints:
        """Returns where tokens are, block id * 16 + place in the block, int64 `[tokens]`.

        `rows`: of the batch, `[tokens]` or one. `numbers`: of the tokens under the table, `[tokens]`: token j is in logical
        block j // 16.
        """
        return np.asarray(self.ids[rows, heads, numbers // BLOCK].astype(np.int64) * BLOCK + numbers % BLOCK)


class Layout(NamedTuple):
    """What the blocks of a layer are made of.

    Attributes:
        kinds: the pairs of formats that its KV heads have, K and V parts.
        of_head: which of them each KV head has, int64 `[kv_heads]`.
        shared_values: of each kind the parts of values of layers that share the keys, which lie beside a block's own.
        scored: of each kind, whether the scores of its tokens are kept too.
    """

    kinds: tuple[tuple[KVPart, KVPart], ...]
    of_head: Ints
    shared_values: tuple[tuple[KVPart, ...], ...]
    scored: tuple[bool, ...]

    @staticmethod
    def of(
        rules: RuleTable, head_dim: int, value_dim: int, dtype: torch.dtype, shared_values: SharedFormats = ()
    ) -> Layout:
        """Returns the layout of KV heads with these rules, sizes and dtype."""
        own = zip(*rules.format_codes.tolist(), strict=True)
        scored = [rule.selects for rule in rules.rules]
        heads = [
            (selects, *formats, *more)
            for selects, formats, more in zip(scored, own, shared_values or ((),) * len(rules), strict=True)
        ]
        formats = sorted(set(heads))

        def values(code: int) -> KVPart:
            return KVPart(code, value_dim, dtype, values=True)

        return Layout(
            tuple((KVPart(key, head_dim, dtype), values(value)) for _, key, value, *_ in formats),
            np.array([formats.index(head) for head in heads], np.int64),
            tuple(tuple(map(values, more)) for _, _, _, *more in formats),
            tuple(selects for selects, *_ in formats),
        )

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        return self.kinds[0][0].dtype

    @property
    def value_dim(self) -> int:
        """Numbers of a value."""
        return self.kinds[0][1].dim

    @property
    def block_bytes(self) -> Ints:
        """Bytes of a block of each kind, int64 `[kinds]`."""
        kv_parts = ((*own, *more) for own, more in zip(self.kinds, self.shared_values, strict=True))
        sizes = [sum(kv_part.nbytes for kv_part in each) for each in kv_parts]
        return np.array(
            [size + BLOCK * SCORE_BYTES * kept for size, kept in zip(sizes, self.scored, strict=True)], np.int64
        )

    @property
    def told_apart(self) -> bool:
        """Whether the parts of blocks say by their bytes of which kind they are: at four numbers a vector they may not."""
        parts = [[*own, *more] for own, more in zip(self.kinds, self.shared_values, strict=True)]
        sizes = [(kept, *[part.nbytes for part in each]) for each, kept in zip(parts, self.scored, strict=True)]
        return len(set(sizes)) == len(sizes)


class Pool:
    """Memory for the blocks of one layer: segments that stay where they are, so that growing moves nothing.

    A segment holds blocks of one pair of formats, and block ids count through the segments. Caches that were forked from each
    other share a pool; the lock makes taking and giving back blocks safe where they run in threads.

    Attributes:
        keys: segments of keys; see `kv_parts`.
        values: segments of values, of as many blocks each.
        shared_values: of every segment those of values of layers that share the keys, in the order of the layout.
        scores: of every segment those of its tokens, int16 `[blocks, 16]`; `[blocks, 0]` where none are kept.
        refs: how many table entries name each block; 0 is free.
        kinds: number of each block's pair of formats in the layout, `[blocks]`.
        shared: whether some block may be named more than once.
        told_apart: see `Layout`; compiled steps take any block of as many bytes, so else there are none.
        lock: held while blocks are taken and given back.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.shared_values: list[tuple[torch.Tensor, ...]] = []
        self.scores: list[torch.Tensor] = []
        self.refs, self.kinds = np.zeros(0, np.int32), np.zeros(0, np.int64)
        self.shared, self.told_apart = False, layout.told_apart
        self.lock = threading.RLock()

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors that hold memory."""
        return [*self.keys, *self.values, *chain.from_iterable(self.shared_values), *self.scores]

    @property
    def used(self) -> int:
        """Blocks that some table names."""
        return int(np.count_nonzero(self.refs))

    def bytes_of(self, ids: Ids) -> int:
        """Returns the bytes of the blocks that are named, each counted once; ids below 0 are no blocks."""
        named = np.unique(ids[ids >= 0])
        return int(self.layout.block_bytes[self.kinds[named]].sum())

    def reserve(self, wanted: Ints) -> None:
        """Adds segments where the pool has fewer blocks of a kind than wanted, int64 `[kinds]`."""
        missing = wanted - np.bincount(self.kinds, minlength=len(wanted))
        for kind in np.flatnonzero(missing > 0).tolist():
            self._add(kind, int(missing[kind]))

    def _add(self, kind: int, blocks: int) -> None:
        keys, values = self.layout.kinds[kind]
        scored = BLOCK if self.layout.scored[kind] else 0
        with torch.inference_mode(False):  # what is made in inference mode cannot be written to outside
            self.keys.append(keys.new(blocks, self.device))
            self.values.append(values.new(blocks, self.device))
            self.shared_values.append(
                tuple(kv_part.new(blocks, self.device) for kv_part in self.layout.shared_values[kind])
            )
            self.scores.append(torch.empty(blocks, scored, dtype=torch.int16, device=self.device))
        self.kinds = np.concatenate([self.kinds, np.full(blocks, kind, np.int64)])
        self.refs = np.concatenate([self.refs, np.zeros(blocks, np.int32)])

    def allocate(self, heads: Ints) -> Ids:
        """Returns the id of a free block for each of these KV heads, named once each; grows where there are too few."""
        taken = np.zeros(len(heads), np.int32)
        wanted = self.layout.of_head[heads]
        for kind in np.unique(wanted).tolist():
            here = np.flatnonzero(wanted == kind)
            free = self._free(kind)
            if len(free) < len(here):
                self._grow(len(here) - len(free), kind)
                free = self._free(kind)
            taken[here] = free[: len(here)]
        self.refs[taken] = 1
        return taken

    def _free(self, kind: int) -> Ints:
        free = self.refs == 0
        return np.flatnonzero(free if len(self.layout.kinds) == 1 else free & (self.kinds == kind))

    def grow(self, missing: int, head: int) -> None:
        """Adds a segment of at least so many blocks for a KV head."""
        self._grow(missing, int(self.layout.of_head[head]))

    def _grow(self, missing: int, kind: int) -> None:
        size = int(np.count_nonzero(self.kinds == kind))
        self._add(kind, max(missing, size // SLACK, LEAST_GROWTH) if size else missing)

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
        """Copies whole blocks, each to one of its own kind."""
        starts = np.cumsum([0, *map(len, self.keys)])
        of, to = (np.searchsorted(starts, ids, side="right") - 1 for ids in (sources, targets))
        for pair in np.unique(np.stack((of, to)), axis=1).T:
            chosen = np.flatnonzero((of == pair[0]) & (to == pair[1]))
            source, target = (
                self._index(ids[chosen] - starts[number]) for ids, number in zip((sources, targets), pair, strict=True)
            )
            for copied, own in zip(self._segment(pair[1]), self._segment(pair[0]), strict=True):
                copied[target] = own[source]

    def only(self, ids: Ids) -> tuple[Pool, Ids]:
        """Returns a pool with copies of some blocks and no others, each counted as often as it is named, and their ids in it.

        `ids`: block ids of any shape; those below 0 are no blocks, and stay so.
        """
        pool, renumbered = Pool(self.layout, self.device), ids.copy()
        named, counts = np.unique(ids[ids >= 0], return_counts=True)
        order = np.argsort(self.kinds[named], kind="stable")  # the blocks of a kind lie in one segment
        places = np.empty(len(named), np.int32)
        places[order] = np.arange(len(named))
        renumbered[ids >= 0] = places[np.searchsorted(named, ids[ids >= 0])]
        pool.reserve(np.bincount(self.kinds[named], minlength=len(self.layout.kinds)))
        pool.refs, pool.shared = counts[order].astype(np.int32), bool((counts > 1).any())
        done = 0
        for number, segment in enumerate(pool.keys):
            for at, picks, inside in self._split(named[order[done : done + len(segment)]].astype(np.int64), 1):
                for copied, own in zip(pool._segment(number), self._segment(at), strict=True):
                    copied[slice(None) if picks is None else picks] = own[inside]
            done += len(segment)
        return pool, renumbered

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = {name: state[name].copy() for name in ("refs", "kinds")}
        self.__dict__.update(state, **own, lock=threading.RLock())

    def write(self, slots: Ints, heads: Ints, key: torch.Tensor, value: torch.Tensor, sources: Ints) -> None:
        """Writes tokens of a chunk, each in the formats of its KV head.

        Args:
            slots: block id * 16 + place in the block, `[tokens]`.
            heads: KV head of each, `[tokens]`.
            key: `[rows, kv_heads, columns, head_dim]`.
            value: `[rows, kv_heads, columns, value_dim]`.
            sources: which of the chunk's tokens each is, `(row * kv_heads + head) * columns + column`, `[tokens]`.
        """
        for kind, chosen in _groups(self.layout.of_head[heads]):
            where = (sources, slots) if chosen is None else (sources[chosen], slots[chosen])
            self._append(self.layout.kinds[kind], key, value, self.values, where)

    def _append(
        self,
        kv_parts: tuple[KVPart | None, KVPart],
        key: torch.Tensor | None,
        value: torch.Tensor,
        values: list[torch.Tensor],
        where: tuple[Ints, Ints],
    ) -> None:
        sources, slots = map(torch.from_numpy, where)
        keys = [] if key is None else self.keys
        backend_for(value).append(kv_parts, key, value, keys=keys, values=values, sources=sources, slots=slots)

    def move(self, slots: Ints, to: Ints, heads: Ints) -> None:
        """Copies tokens, with their scores, to places in blocks of their own kind; the kinds keep scores.

        `slots`: where they are, block id * 16 + place in the block, `[tokens]`. `to`: where they go to.
        """
        of, source, target = map(torch.from_numpy, (heads, slots, to))
        kv_parts = [self.layout.kinds[kind] for kind in self.layout.of_head.tolist()]
        (scores,) = self.value_sets()
        backend = backend_for(torch.empty(0, dtype=self.layout.dtype, device=self.device))
        backend.move_selected(kv_parts, self.keys, self.values, scores, heads=of, slots=source, to=target)

    def read_scores(self, slots: Ints) -> torch.Tensor:
        """Returns the scores of tokens, int16 `[tokens]`; the arguments are those of `move`."""
        found = torch.zeros(len(slots), dtype=torch.int16, device=self.device)
        for at, picks, inside in self._split(slots, BLOCK) if len(slots) else []:
            found[slice(None) if picks is None else picks] = self.scores[at].view(-1)[inside]
        return found

    def write_scores(self, slots: Ints, scores: torch.Tensor) -> None:
        """Writes the scores of tokens, int16 `[tokens]`; see `read_scores`."""
        for at, picks, inside in self._split(slots, BLOCK) if len(slots) else []:
            self.scores[at].view(-1)[inside] = scores if picks is None else scores[picks]

    def write_shared_values(
        self, slots: Ints, heads: Ints, value_sets: Ints, value: torch.Tensor, sources: Ints
    ) -> None:
        """Writes values of a layer that shares the keys.

        `slots`: block id * 16 + place in the block, `[tokens]`. `heads`: KV head whose block each is in, `[tokens]`. `value`:
        `[rows, heads of that layer, columns, value_dim]`. `sources`: which of its tokens each is, as for `write`.
        """
        for value_set, of_set in _groups(value_sets):
            segments = self.shared_values_of(value_set)
            for kind, chosen in _groups(self.layout.of_head[heads if of_set is None else heads[of_set]]):
                kv_part = self.layout.shared_values[kind][value_set]
                both = of_set if chosen is None else chosen if of_set is None else of_set[chosen]
                where = (sources, slots) if both is None else (sources[both], slots[both])
                self._append((None, kv_part), None, value, segments, where)

    def shared_values_of(self, value_set: int) -> list[torch.Tensor]:
        """Returns segments of values that lie beside the blocks' own; the own where a segment has no such."""
        return [
            more[value_set] if value_set < len(more) else own
            for own, more in zip(self.values, self.shared_values, strict=True)
        ]

    def value_sets(self) -> list[list[torch.Tensor]]:
        """Returns of every set of shared values its part of each segment, of no bytes where there is none.

        Where scores are kept, theirs is the one value set.
        """
        if any(self.layout.scored):
            return [[part.view(torch.uint8) if part.shape[1] else self._nothing(len(part)) for part in self.scores]]

        def part(number: int, value_set: int) -> torch.Tensor:
            more = self.shared_values[number]
            return more[value_set] if value_set < len(more) else self._nothing(len(self.keys[number]))

        return [
            [part(at, value_set) for at in range(len(self.keys))]
            for value_set in range(max(map(len, self.layout.shared_values)))
        ]

    def _nothing(self, blocks: int) -> torch.Tensor:
        return torch.empty(blocks, 0, dtype=torch.uint8, device=self.device)

    def _split(self, places: Ints, unit: int) -> list[tuple[int, torch.Tensor | None, torch.Tensor]]:
        """Returns of every segment that is met its number, which of the places lie in it (None: all), and where there."""
        if len(self.keys) == 1:
            return [(0, None, self._index(places))]
        starts = np.cumsum([0, *(len(segment) * unit for segment in self.keys)])
        number = np.searchsorted(starts, places, side="right") - 1
        parts = []
        for at, picks in _groups(number):
            inside = (places if picks is None else places[picks]) - starts[at]
            parts.append((at, None if picks is None else self._index(picks), self._index(inside)))
        return parts

    def _segment(self, number: int) -> tuple[torch.Tensor, ...]:
        scores = (self.scores[number],) if self.scores[number].shape[1] else ()
        return self.keys[number], self.values[number], *self.shared_values[number], *scores

    def _index(self, numbers: npt.NDArray[np.integer]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(numbers, np.int64)).to(self.device)


def _groups(numbers: Ints) -> list[tuple[int, Ints | None]]:
    """Returns every number that there is, and the places where it stands; None where it stands everywhere."""
    found = np.unique(numbers).tolist()
    return [(number, None if len(found) == 1 else np.flatnonzero(numbers == number)) for number in found]
