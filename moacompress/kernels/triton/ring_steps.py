"""Decode steps over rings of blocks: all that they read lies on the device, and they ask the host for nothing.

What a step is launched with does not depend on how long rows are: the tensors of a `RingState` and the parts of the sum stay
where they are, and lengths grow on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from moacompress.kernels.arguments import RingState, Scores
from moacompress.kernels.backend import BoundRing
from moacompress.kernels.kv_parts import KVPart
from moacompress.kernels.reference.codes import rotated
from moacompress.kernels.triton import append_kernels, decode_kernels, select_kernels
from moacompress.kernels.triton.cache_writes import Memory, by_kind, memory_of, score_memory
from moacompress.kernels.triton.decode import add_up
from moacompress.kernels.triton.tile_sizes import (
    APPEND_WARPS,
    SELECT_WARPS,
    append_next_constants,
    select_constants,
    split_constants,
)
from moacompress.kernels.triton.work_lists import kinds_of, sent, shares
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable


class _Kind(NamedTuple):
    """The KV heads of one pair of formats.

    Attributes:
        kv_parts: how they keep keys and values.
        memory: of keys and of values.
        scores: memory of scores; None where none of them selects.
        heads: all of them, int64.
        selecting: those that select, likewise.
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


class RingSteps(BoundRing):
    """The steps of a layer.

    Args:
        ring: the layer's cache.
        rules: of the KV heads, in numpy.
        head_dim: numbers of a key.
        value_dim: numbers of a value.
        dtype: of the model.
        wide: whether products are in float32.
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
        self._ring, self._wide, self._value_dim, self._dtype = ring, wide, value_dim, dtype
        self._columns, self._full, self._rings, self._begins = sent((rules.columns, full, ring.sizes, begins), device)
        self._kinds = []
        for number, pair in enumerate(kinds.pairs):
            mine = kinds.number == number
            selecting = np.flatnonzero(mine & rules.selecting)
            works = work[mine[work[:, 1]]], selected_work[mine[selected_work[:, 0] % kv_heads]]
            memory = memory_of(ring.keys, pair[0]), memory_of(ring.values, pair[1])
            scores = score_memory(ring.scores) if len(selecting) else None
            heads, gated, own, others = sent((np.flatnonzero(mine), selecting, *works), device)
            self._kinds.append(_Kind(pair, memory, scores, heads, gated, own, others, int(chunks[mine][0])))
        coded = rules.format_codes != 0
        self._turns_queries, self._turns_outputs = (bool(side.any()) for side in coded)
        self._turned, self._selecting = sent((coded[1], rules.selecting), device)
        self._places = int(begins[-1])
        self._partial: tuple[torch.Tensor, torch.Tensor] | None = None

    def step(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scores: Scores,
        gate_scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `BoundRing.step`."""
        rows, heads = query.shape[:2]
        kv_heads, ring = key.shape[1], self._ring
        key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (key.detach(), value.detach()))
        self._write(key, value, gate_scores)
        ring.lengths.add_(1)
        group, out = heads // kv_heads, self._out(query)
        if self._partial is None:
            partial = torch.empty(self._places, group, self._value_dim, dtype=torch.float32, device=query.device)
            self._partial = partial, partial.new_empty(partial.shape[:2])
        plain = query[:, :, 0].contiguous()
        turned = rotated(plain).to(query.dtype) if self._turns_queries else plain
        for kind in self._kinds:
            self._attend(kind, turned if kind.kv_parts[0].bits else plain, scores, kv_heads, group)
        lse = torch.empty(rows, heads, dtype=torch.float32, device=query.device)
        add_up(self._partial, self._begins, scores, out, lse)
        if self._turns_outputs:
            back = self._turned.bool().repeat_interleave(group, output_size=heads)[None, :, None]
            out = torch.where(back, rotated(out), out).to(query.dtype)
        return out[:, None]

    def _out(self, query: torch.Tensor) -> torch.Tensor:
        dtype = torch.float32 if self._turns_outputs else query.dtype
        return torch.empty(*query.shape[:2], self._value_dim, dtype=dtype, device=query.device)

    def _write(self, key: torch.Tensor, value: torch.Tensor, gate_scores: torch.Tensor | None) -> None:
        """Lets tokens compete that windows leave behind, and writes the new ones, which may go into the places of others."""
        ring = self._ring
        rows, kv_heads, width = ring.table.shape
        for kind in self._kinds:
            if kind.scores is not None and ring.selected is not None:
                select_kernels.select[(rows * len(kind.selecting),)](
                    *by_kind(*kind.memory, kind.scores),
                    ring.table,
                    self._rings,
                    ring.selected,
                    ring.counts,
                    ring.lengths,
                    self._columns,
                    kind.selecting,
                    len(kind.selecting),
                    kv_heads,
                    width,
                    ring.selected.shape[-1],
                    **select_constants(*kind.kv_parts, ring=True),
                    num_warps=SELECT_WARPS,
                )
            append_kernels.append_next[(rows * len(kind.heads),)](
                key,
                value,
                self._rings if gate_scores is None else gate_scores.contiguous(),
                *by_kind(*kind.memory, kind.scores or kind.memory[0]),
                ring.table,
                self._rings,
                ring.lengths,
                kind.heads,
                self._selecting,
                len(kind.heads),
                kv_heads,
                width,
                *key.stride()[:2],
                *value.stride()[:2],
                **append_next_constants(*kind.kv_parts, scored=kind.scores is not None),
                num_warps=APPEND_WARPS,
                enable_fp_fusion=False,
            )

    def _attend(self, kind: _Kind, query: torch.Tensor, scores: Scores, kv_heads: int, group: int) -> None:
        """Attends to windows, and then to selected tokens: a row and KV head is a row of one there."""
        ring, (key, value), partial = self._ring, kind.kv_parts, self._partial
        assert partial is not None
        passes = [(kind.work, ring.table, self._rings, ring.lengths, self._columns, kv_heads)]
        if ring.selected is not None and ring.counts is not None and len(kind.selected_work):
            passes.append((kind.selected_work, ring.selected, self._rings, ring.counts, self._full, 1))
        for number, (work, table, rings, lengths, columns, heads) in enumerate(passes):
            tiles, constants = split_constants(
                group,
                key.dim,
                value.dim,
                (key.bits, value.bits),
                softcap=bool(scores.softcap),
                wide=self._wide,
                item_size=query.element_size(),
                ring=not number,
            )
            (keys, key_places), (values, value_places) = kind.memory
            decode_kernels.split[(len(work),)](
                query,
                keys,
                values,
                key_places,
                value_places,
                table,
                rings,
                lengths,
                columns,
                work,
                *partial,
                float(scores.scaling),
                float(scores.softcap),
                heads,
                table.shape[-1],
                kind.chunk,
                **constants,
                num_warps=tiles.num_warps,
            )
