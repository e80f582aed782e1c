"""The tokens that gates select of a layer, in vLLM's blocks.

Scores lie beside keys and values, so that who is selected follows from the blocks alone. While a step computes a sequence of n
tokens, those that have left the windows of its query n + 1 compete at the end of the layer's attention, and those that win are
copied to the places of those that they replace: before the next step, vLLM gives the blocks that they were in to others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from moacompress.core.arrays import Bools, Ints
from moacompress.core.errors import UnsupportedError
from moacompress.kernels.arguments import SelectedView, TransientTokens
from moacompress.kernels.backend import Backend
from moacompress.kernels.kv_parts import KVPart
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.selection import EvictionSchedule, competing_tokens
from moacompress.rules.windows import BLOCK

Ids = npt.NDArray[np.int32]


@dataclass
class SelectedPart:
    """Where the selected tokens of a KV head lie, and the scores of all its tokens.

    Attributes:
        units: of each unit of a block its keys, its values and its scores, int16 `[blocks, 16]`; with the parts of all blocks.
        numbers: of the head's units, by their places.
        of_class: the class of the blocks.
        window_scores: of tokens of sinks and window, int16 `[blocks, 16]`.
    """

    units: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    numbers: Ints
    of_class: int
    window_scores: torch.Tensor


class SelectedMemory:
    """Where what gates select of a layer lies; block ids count on through `keys`: those of windows, then those of units.

    `keys` and `values` are of each KV head its part of all blocks, and `parts` are of those that select.
    """

    def __init__(
        self,
        rules: RuleTable,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        kv_parts: Sequence[tuple[KVPart, KVPart]],
        parts: dict[int, SelectedPart],
    ) -> None:
        self.rules, self.parts, self.kv_parts, self.blocks = rules, parts, kv_parts, len(keys[0])
        self.keys, self.values = [*keys], [*values]
        self._scores = {head: part.window_scores.numpy() for head, part in parts.items()}
        self._ids: dict[int, tuple[Ints, Ids]] = {}
        units = max(len(part.units) for part in parts.values())
        if (len(keys) + units * len(parts)) * self.blocks >= 1 << 31:
            raise UnsupportedError(
                f"vLLM cannot serve a plan with gates in so large a KV cache: {self.blocks:,} blocks; give it less memory "
                "(`--kv-cache-memory-bytes`)"
            )
        segments = [torch.empty(self.blocks, 0, dtype=torch.uint8) for _ in keys]
        for head, part in parts.items():
            segments[head] = part.window_scores.view(torch.uint8)
            block, unit = np.divmod(part.numbers, len(part.units))
            first = (len(self.keys) + unit) * self.blocks
            self._ids[head] = block, first.astype(np.int32)
            for key, value, scores in part.units:
                self._scores[len(self.keys)] = scores.numpy()
                self.keys.append(key)
                self.values.append(value)
                segments.append(scores.view(torch.uint8))
        self.score_segments = segments
        self._width = max(len(block) for block, _ in self._ids.values())

    def view(self, tables: Sequence[Ids]) -> SelectedView:
        """Returns where the selected tokens of rows lie, by tables of each class; unused ids in them mean nothing."""
        found = np.zeros((len(tables[0]), len(self.rules), self._width), np.int32)
        for head, (blocks, first) in self._ids.items():
            table = tables[self.parts[head].of_class]
            count = int(np.searchsorted(blocks, table.shape[1]))
            found[:, head, :count] = table[:, blocks[:count]] + first[:count]
        return SelectedView(torch.from_numpy(found), self.score_segments)

    def put_scores(self, slots: Ints, scores: npt.NDArray[np.int16]) -> None:
        """Writes the scores of new tokens, `[tokens, kv_heads]`, to the slots where they lie."""
        blocks, places = np.divmod(slots, BLOCK)
        for head in self.parts:
            self._scores[head][blocks[:, head], places[:, head]] = scores[:, head]

    def scores_of(self, slots: Ints) -> Ints:
        """Returns the scores of tokens that lie at block id * 16 + place, `[tokens]`."""
        found, (segments, blocks) = np.empty(len(slots), np.int64), np.divmod(slots // BLOCK, self.blocks)
        for segment, scores in self._scores.items():
            at = np.flatnonzero(segments == segment)
            found[at] = scores[blocks[at], slots[at] % BLOCK]
        return found


class Selection:
    """What becomes of the selected tokens of some rows in a step, whose tokens are in the layer's memory already.

    `table` and `selected` are block ids of windows and of selected tokens, int32 `[rows, kv_heads, any]`; `past` and `lengths`
    are the tokens of each row before the step and after it, `[rows]`.
    """

    def __init__(
        self, memory: SelectedMemory, table: Ids, selected: Ids, past: Ints, lengths: Ints, backend: Backend
    ) -> None:
        self._memory, self._ids, self._backend = memory, (table, selected), backend
        rules = memory.rules
        tokens = competing_tokens(rules, rules.tokens_left(past + 1), rules.tokens_left(lengths + 1))
        scores = memory.scores_of(_slots(tokens, tokens.positions < 0, self._ids))
        self.schedule = backend.eviction_schedule(tokens, rules, scores)

    def transient(self, row: int) -> TransientTokens:
        """Returns the selected tokens that the new queries of a row attend to."""
        tokens = self.schedule.of_rows(np.array([row])).ever_selected
        slots = _slots(tokens, tokens.positions < 0, self._ids, row)
        return TransientTokens(*map(torch.from_numpy, (tokens.begins, slots, tokens.admitted, tokens.evicted)))

    def commit(self) -> None:
        """Copies tokens that are selected from now on to their places."""
        admitted = self.schedule.newly_selected
        if len(admitted.places):
            _, heads = admitted.rows_and_heads
            never, always = np.zeros_like(heads, np.bool_), np.ones_like(heads, np.bool_)
            slots, to = (_slots(admitted, where, self._ids) for where in (never, always))
            kept = self._memory.kv_parts, self._memory.keys, self._memory.values, self._memory.score_segments
            of, source, target = map(torch.from_numpy, (heads, slots, to))
            self._backend.move_selected(*kept, heads=of, slots=source, to=target)


def _slots(tokens: EvictionSchedule, selected: Bools, ids: tuple[Ids, Ids], first: int = 0) -> Ints:
    """Returns block id * 16 + place of tokens, of which the first one is of the row `first`, int64 `[tokens]`.

    Those that are `selected` are looked for in their places among selected ones, the others in their windows; `ids` are block
    ids of windows and of selected tokens, `[rows, kv_heads, any]` each.
    """
    slots, (rows, heads) = np.empty(len(selected), np.int64), tokens.rows_and_heads
    for at, numbers, table in ((~selected, tokens.positions, ids[0]), (selected, tokens.places, ids[1])):
        few = numbers[at]
        slots[at] = table[rows[at] + first, heads[at], few // BLOCK].astype(np.int64) * BLOCK + few % BLOCK
    return slots
