"""Decode steps over rings of blocks: all that they read lies on the device, and they ask the host for nothing.

What a step is launched with does not depend on how long rows are: the tensors of a `RingState` and the parts of the sum stay
where they are, and lengths grow on the device. A layer that others share attention with keeps its scores of a step, by the
places of tokens under the table; those layers read them in place of queries and keys, so that they take 4 bytes a query head
of a token rather than its key, whatever that is kept as.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from moacompress.core.arrays import Ints
from moacompress.kernels.arguments import RingState, Scores, dense_rows
from moacompress.kernels.bound import BoundReuse, BoundRing
from moacompress.kernels.kv_parts import KVPart
from moacompress.kernels.reference.codes import rotated
from moacompress.kernels.triton import append_kernels, select_kernels
from moacompress.kernels.triton.cache_writes import by_kind, score_memory
from moacompress.kernels.triton.cards import card_of
from moacompress.kernels.triton.decode import Stretches, add_up, launch_split
from moacompress.kernels.triton.tile_sizes import (
    APPEND_WARPS,
    SELECT_WARPS,
    append_next_constants,
    select_constants,
    split_constants,
)
from moacompress.kernels.triton.work_lists import Memory, kinds_of, memory_of, shares, to_device
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import BLOCK

KEPT_BYTES = 4
"""Of a score that is kept for layers that share attention."""


class _Kind(NamedTuple):
    """The KV heads of one pair of formats.

    Attributes:
        kv_parts: how they keep keys and values.
        memory: of keys and of values.
        scores: memory of scores; None where none of them selects.
        heads: all of them, see `append_kernels.append_next`.
        selecting: those that select, int64.
        work: see `decode_kernels.split`.
        selected_work: the same over selected tokens, where a row and KV head is a row of one KV head.
        chunk: blocks of a stretch.
    """

    kv_parts: tuple[KVPart, KVPart]
    memory: tuple[Memory, Memory]
    scores: Memory | None
    heads: torch.Tensor
    selecting: torch.Tensor
    work: torch.Tensor
    selected_work: torch.Tensor
    chunk: int


class _ReuseKind(NamedTuple):
    """KV heads of a layer that shares attention whose values lie in one set beside the blocks' own, in one format.

    `work` reads the scores of other KV heads; else as `_Kind`.
    """

    value: KVPart
    memory: Memory
    heads: torch.Tensor
    work: torch.Tensor
    chunk: int


class Parts(NamedTuple):
    """Memory that a layer's steps write to, the same in every one.

    Attributes:
        partial: parts of the sum, and logs of their denominators; see `decode_kernels.split`.
        total: their sum where it is still to be turned, float32 `[rows, heads, value_dim]`.
        total_lse: log of its denominator, float32 `[rows, heads]`.
    """

    partial: tuple[torch.Tensor, torch.Tensor]
    total: torch.Tensor
    total_lse: torch.Tensor


class RingSteps(BoundRing):
    """The steps of a layer; `wide` says whether products are in float32.

    Attributes:
        columns: of the rules, on the device.
        rings: see `tiles.ring_of`.
        kept: scores of the last step, see `decode_kernels.split`; None before it, and where no layer shares the attention.
        taken: whether each row was given a token in the last step, int64 `[rows]`.
    """

    def __init__(
        self, ring: RingState, rules: RuleTable, head_dim: int, value_dim: int, dtype: torch.dtype, *, wide: bool
    ) -> None:
        rows, kv_heads, _ = ring.table.shape
        device = ring.table.device
        kinds = kinds_of(rules, head_dim, value_dim, dtype)
        of_selected = 0 if ring.selected is None else ring.selected.shape[-1]
        blocks, more = (
            np.broadcast_to(each, (rows, kv_heads)) for each in (ring.sizes.sum(0), rules.selecting * of_selected)
        )
        token_bytes = rules.token_bytes(head_dim, value_dim, str(dtype).removeprefix("torch."))
        chunks, work, selected_work, begins = shares(blocks, more, token_bytes)
        full = RuleTable.of([Rule.FULL], 1).columns
        self.ring, self.wide, self.dims, self.dtype = ring, wide, (head_dim, value_dim), dtype
        self.kept: torch.Tensor | None = None
        numbers = (rules.columns, full, ring.sizes, begins, np.ones(rows, np.int64))
        self.columns, self._full, self.rings, self._begins, self._all_rows = to_device(numbers, device)
        self.taken = self._all_rows
        self._kinds = []
        for number, pair in enumerate(kinds.pairs):
            mine = kinds.number == number
            own, selecting = (np.flatnonzero(each) for each in (mine, mine & rules.selecting))
            works = work[mine[work[:, 1]]], selected_work[mine[selected_work[:, 0] % kv_heads]]
            memory = memory_of(ring.keys, pair[0]), memory_of(ring.values, pair[1])
            scores = score_memory(ring.scores) if len(selecting) else None
            heads, gated, read, others = to_device((np.stack((own, own)), selecting, *works), device)
            self._kinds.append(_Kind(pair, memory, scores, heads, gated, read, others, int(chunks[mine][0])))
        coded = rules.format_codes != 0
        self._turns_queries, self._turns_outputs = (bool(side.any()) for side in coded)
        self._turned, self._selecting = to_device((coded[1], rules.selecting), device)
        self._places = int(begins[-1])
        self._parts: Parts | None = None

    def step(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scores: Scores,
        gate_scores: torch.Tensor | None = None,
        taken: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `BoundRing.step`."""
        with torch.cuda.device_of(query):  # Triton launches on the current GPU
            (rows, heads), kv_heads = query.shape[:2], key.shape[1]
            key, value = dense_rows(key.detach()), dense_rows(value.detach())
            self.taken = self._all_rows if taken is None else taken
            self._write(key, value, gate_scores)
            self.ring.lengths.add_(self.taken)
            group = heads // kv_heads
            if self._parts is None:
                self._parts = new_parts(self._places, rows, heads, group, self.dims[1], like=query)
                if self.ring.shared_values:
                    tokens = self.ring.table.shape[-1] * BLOCK
                    self.kept = torch.empty(rows, kv_heads, group, tokens, dtype=torch.float32, device=query.device)
            plain = query[:, :, 0].contiguous()
            turned = rotated(plain).to(query.dtype) if self._turns_queries else plain
            for kind in self._kinds:
                self._attend(kind, turned if kind.kv_parts[0].bits else plain, scores, group)
            turns = self._turned if self._turns_outputs else None
            return added_up(self._parts, self._begins, scores, turns, query.dtype)

    def reuse(self, *, head_map: Ints, value_sets: Ints, value_formats: Ints) -> BoundReuse:
        """See `BoundRing.reuse`."""
        return ReuseSteps(self, head_map, value_sets, value_formats)

    def _write(self, key: torch.Tensor, value: torch.Tensor, gate_scores: torch.Tensor | None) -> None:
        """Lets tokens compete that windows leave behind, and writes the new ones, which may go into the places of others."""
        ring = self.ring
        rows, kv_heads, width = ring.table.shape
        for kind in self._kinds:
            if kind.scores is not None and ring.selected is not None:
                select_kernels.select[(rows * len(kind.selecting),)](
                    *by_kind(*kind.memory, kind.scores),
                    ring.table,
                    self.rings,
                    ring.selected,
                    ring.counts,
                    ring.lengths,
                    self.taken,
                    self.columns,
                    kind.selecting,
                    len(kind.selecting),
                    kv_heads,
                    width,
                    ring.selected.shape[-1],
                    **select_constants(*kind.kv_parts, ring=True),
                    num_warps=SELECT_WARPS,
                )
            assert kind.scores is None or gate_scores is not None
            self.append(
                (key, value, self.rings if gate_scores is None else gate_scores.contiguous()),
                (*kind.memory, kind.scores or kind.memory[0]),
                kind.heads,
                append_next_constants(*kind.kv_parts, scored=kind.scores is not None),
            )

    def append(
        self,
        token: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        memory: tuple[Memory, Memory, Memory],
        heads: torch.Tensor,
        constants: dict[str, int | bool | float],
    ) -> None:
        """Writes one more token of the rows that are given one.

        `token` has keys and values, `[rows, kv_heads, 1, dim]`, and scores of gates, which go to `memory`; for `heads` and
        `constants` see `append_kernels.append_next`.
        """
        ring, (key, value, _) = self.ring, token
        rows, kv_heads, width = ring.table.shape
        append_kernels.append_next[(rows * heads.shape[1],)](
            *token,
            *by_kind(*memory),
            ring.table,
            self.rings,
            ring.lengths,
            self.taken,
            heads,
            self._selecting,
            heads.shape[1],
            kv_heads,
            width,
            *key.stride()[:2],
            *value.stride()[:2],
            **constants,
            num_warps=APPEND_WARPS,
            enable_fp_fusion=False,
        )

    def _attend(self, kind: _Kind, query: torch.Tensor, scores: Scores, group: int) -> None:
        """Attends to windows, and then to selected tokens: a row and KV head is a row of one there."""
        ring, (key, value), parts = self.ring, kind.kv_parts, self._parts
        assert parts is not None
        passes = [self.stretches(kind.work, kind.chunk)]
        if ring.selected is not None and ring.counts is not None and len(kind.selected_work):
            passes.append(
                Stretches(kind.selected_work, ring.selected, self.rings, ring.counts, self._full, 1, kind.chunk)
            )
        for number, stretches in enumerate(passes):
            tiles, constants = split_constants(
                group,
                key.dim,
                value.dim,
                (key.bits, value.bits),
                softcap=bool(scores.softcap),
                wide=self.wide,
                item_size=query.element_size(),
                card=card_of(query.device),
                ring=not number,
                keep=self.kept is not None and not number,
            )
            launch_split(query, kind.memory, stretches, self.kept, parts.partial, scores, (tiles, constants))

    def stretches(self, work: torch.Tensor, chunk: int) -> Stretches:
        """Returns stretches of windows; see `Stretches`."""
        ring = self.ring
        return Stretches(work, ring.table, self.rings, ring.lengths, self.columns, ring.table.shape[1], chunk)


class ReuseSteps(BoundReuse):
    """The steps of a layer that shares the attention of another; see `BoundRing.reuse`."""

    def __init__(self, anchor: RingSteps, head_map: Ints, value_sets: Ints, value_formats: Ints) -> None:
        ring, (_, value_dim) = anchor.ring, anchor.dims
        (rows, kv_heads, _), device = ring.table.shape, ring.table.device
        group = 1 if anchor.kept is None else anchor.kept.shape[2]
        places = np.stack((value_sets, value_formats))
        found, number = np.unique(places, axis=1, return_inverse=True)
        kv_parts = [KVPart(code, value_dim, anchor.dtype, values=True) for code in value_formats.tolist()]
        token_bytes = np.array([each.nbytes // BLOCK for each in kv_parts], np.int64) + group * KEPT_BYTES
        blocks = np.broadcast_to(ring.sizes.sum(0)[head_map], (rows, kv_heads))
        chunks, work, _, begins = shares(blocks, np.zeros_like(blocks), token_bytes)
        self._anchor, self._kinds = anchor, []
        for at, (value_set, code) in enumerate(found.T.tolist()):
            mine = number.reshape(-1) == at
            own, parts = np.flatnonzero(mine), work[mine[work[:, 1]]]
            parts[:, 1] = head_map[parts[:, 1]]
            value = KVPart(code, value_dim, anchor.dtype, values=True)
            memory = memory_of(ring.shared_values[value_set], value)
            heads, read = to_device((np.stack((own, head_map[own])), parts), device)
            self._kinds.append(_ReuseKind(value, memory, heads, read, int(chunks[mine][0])))
        coded = value_formats != 0
        self._begins, self._turned = to_device((begins, coded), device)
        self._turns_outputs = bool(coded.any())
        self._parts = new_parts(int(begins[-1]), rows, kv_heads * group, group, value_dim, like=ring.lengths)

    def step(self, value: torch.Tensor, *, scores: Scores) -> torch.Tensor:
        """See `BoundReuse.step`."""
        with torch.cuda.device_of(value):
            anchor, value = self._anchor, dense_rows(value.detach())
            assert anchor.kept is not None
            group = anchor.kept.shape[2]
            for kind in self._kinds:
                token, memory = (value, value, anchor.rings), (kind.memory,) * 3
                anchor.append(token, memory, kind.heads, append_next_constants(None, kind.value, scored=False))
                tiles, constants = split_constants(
                    group,
                    kind.value.dim,
                    kind.value.dim,
                    (0, kind.value.bits),
                    softcap=bool(scores.softcap),
                    wide=anchor.wide,
                    item_size=value.element_size(),
                    card=card_of(value.device),
                    ring=True,
                    reuse=True,
                )
                stretches = anchor.stretches(kind.work, kind.chunk)
                launch_split(
                    value, (kind.memory,) * 2, stretches, anchor.kept, self._parts.partial, scores, (tiles, constants)
                )
            turns = self._turned if self._turns_outputs else None
            return added_up(self._parts, self._begins, scores, turns, value.dtype)


def new_parts(places: int, rows: int, heads: int, group: int, value_dim: int, *, like: torch.Tensor) -> Parts:
    """Returns memory for a layer's steps, for so many places of parts of the sum, on the device of `like`."""
    partial, total = (
        like.new_empty(*sizes, dtype=torch.float32) for sizes in ((places, group, value_dim), (rows, heads, value_dim))
    )
    return Parts((partial, partial.new_empty(partial.shape[:2])), total, total.new_empty(total.shape[:2]))


def added_up(
    parts: Parts, begins: torch.Tensor, scores: Scores, turned: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Returns the sum of the parts of a step's attention, `[rows, 1, heads, value_dim]`, in memory of its own.

    `turned` says which KV heads have values in the rotated basis, `[kv_heads]`; None where none has.
    """
    if turned is None:
        out = parts.total.new_empty(parts.total.shape, dtype=dtype)
        add_up(parts.partial, begins, scores, out, parts.total_lse)
        return out[:, None]
    add_up(parts.partial, begins, scores, parts.total, parts.total_lse)
    group, heads = parts.partial[0].shape[1], parts.total.shape[1]
    back = turned.bool().repeat_interleave(group, output_size=heads)[None, :, None]
    return torch.where(back, rotated(parts.total), parts.total).to(dtype)[:, None]
