"""The cache of one layer as transformers and the attention see it: with blocks of its own, or in those of its anchor."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from moacompress.core.arrays import Bools, Ints
from moacompress.core.errors import UnsupportedError
from moacompress.kernels.arguments import AllocationShortfall, CacheState, CacheView, Scores
from moacompress.kernels.backend import Backend
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.selection import EvictionSchedule
from moacompress.runtime.cache.block_runs import BEGIN, END, LAG
from moacompress.runtime.cache.commit import commit
from moacompress.runtime.cache.layer_blocks import LayerBlocks
from moacompress.runtime.cache.pool import Pool, SharedFormats, reserved
from moacompress.runtime.cache.real_tokens import Chunk
from moacompress.runtime.cache.ring import Ring, ring_for
from moacompress.runtime.cache.selected_tokens import can_go_back, go_back, remember

RING_RETRY_TOKENS = 64
"""Tokens that go by before rings are looked for again where there were none to be had: as beams are, for many steps."""

StepCall = Callable[[CacheState], tuple[torch.Tensor, AllocationShortfall | None]]
"""A call of a backend that takes one more token of every row into the cache."""


class CacheLayer(CacheLayerMixin):
    """What transformers asks of the cache of any layer.

    Attributes:
        columns: tokens fed so far, padding included; transformers' length.
        stepping: whether a compiled call has begun whose token is not counted yet; after a forward, that it was interrupted.
        record_past: whether `LAG` tokens are kept longer, so that drafts can be rolled back.
    """

    is_compileable = False
    """As `generate` asks: it would capture steps as CUDA graphs, and what the host counts in a step would not be counted."""
    supports_early_init = False
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.columns = 0
        self.stepping = self.record_past = False

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether drafts can be rolled back: while a little more than the plan's is kept."""
        return self.record_past

    @property
    @abstractmethod
    def lengths(self) -> Ints:
        """Real tokens of every row, int64 `[rows]`; in a forward, until the layer has taken in its chunk, those before it."""

    @property
    def rows(self) -> int:
        """Rows in the cache."""
        return len(self.lengths)

    @property
    def batch_size(self) -> int:
        """Rows in the cache, -1 while it is empty."""
        return self.rows if self.is_initialized else -1

    @abstractmethod
    def count_steps(self, steps: int) -> None:
        """See `PlanCache.count_steps`."""

    @abstractmethod
    def select(self, rows: Ints) -> None:
        """Makes the given rows, with repeats, the rows of the cache; they share their blocks until they are written to."""

    @abstractmethod
    def roll_back(self, counts: Ints, columns: int) -> None:
        """Forgets the last real tokens of every row.

        `counts`: how many, `[rows]`. `columns`: tokens fed that they were, padding included.

        Raises:
            UnsupportedError: what the earlier length needs is gone.
        """

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns `(kv_length, kv_offset)` as transformers asks for it."""
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Returns the number of tokens fed so far, padding included."""
        return self.columns

    def get_max_length(self) -> int:
        """Returns -1: the cache grows as long as memory lasts."""
        return -1

    def activate_past_recording(self, **kwargs: Any) -> None:
        """Keeps `LAG` tokens longer from now on, so that drafts can be rolled back; `kwargs` are for recurrent states."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens of every row; see `PlanCache.crop`, which knows of padding."""
        count = abs(int(tokens_to_remove))  # before transformers 5.18 it may be a tensor
        if count and self.is_initialized:
            self.roll_back(np.full(len(self.lengths), count, np.int64), count)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Makes row `beam_idx[i]` row i; rows of the same origin share blocks."""
        self.select(beam_idx.detach().cpu().numpy())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the given rows of the batch, in that order."""
        rows = indices.detach().cpu()
        self.select((torch.nonzero(rows)[:, 0] if rows.dtype == torch.bool else rows).numpy())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch; the copies share blocks."""
        self.select(np.arange(len(self.lengths)).repeat(repeats))

    def offload(self) -> None:
        """Refused: the cache stays on its device."""
        raise UnsupportedError("an offloaded cache is not supported by moacompress; its own cache is small already")

    prefetch = offload


class PlanCacheLayer(CacheLayer):
    """The cache of one layer; the attention reads and commits it, transformers only asks for its length.

    Where other layers share its keys, their values lie beside its own in its blocks. They attend after it in a forward, so it
    keeps what they need of the cache before the chunk until the last of them has taken in its values.

    `reserve`: tokens of a row that there may be in the end, or None.

    Single tokens may go into rings of its blocks (`ring`), where the device counts them: what is held is known again once
    the ring is left.
    """

    def __init__(self, rules: RuleTable, reserve: int | None = None, shared_values: SharedFormats = ()) -> None:
        super().__init__()
        self.rules, self.reserve, self.shared_values = rules, reserve, shared_values
        self._memory: Pool | None = None
        self._clear()

    def _clear(self) -> None:
        self.columns = 0
        self._ring: Ring | None = None
        self._look_again = 0  # columns before which no ring is looked for
        self._repeated = False  # in the midst of steps: as beams are, where copies for a ring would serve one step
        self._held: LayerBlocks | None = None
        self._pending: tuple[torch.Tensor, torch.Tensor] | None = None
        self._before: LayerBlocks | None = None
        self.lengths_before: Ints = np.zeros(0, np.int64)
        self.stepping = False
        self.is_initialized = False

    @property
    def is_full(self) -> bool:
        """Whether rings, in which its tokens are, have no place for more."""
        return self._ring is not None and self._ring.is_full

    @property
    def held(self) -> LayerBlocks | None:
        """Its blocks; None while it is empty."""
        if self._ring is not None:
            self._ring.leave()
            self._ring = None
        return self._held

    @held.setter
    def held(self, held: LayerBlocks | None) -> None:
        self._ring, self._held = None, held

    @property
    def rows(self) -> int:
        """Rows in the cache."""
        return 0 if self._held is None else len(self._held.lengths)

    @property
    def lag(self) -> int:
        """Tokens that are kept longer than the plan says, so that drafts can be rolled back.

        What gates selected is known of some lengths alone, `LAG` tokens apart at most: from there it is made again.
        """
        return LAG * (1 + self.rules.selects) if self.record_past else 0

    @property
    def lengths(self) -> Ints:
        """Real tokens of every row, int64 `[rows]`."""
        return np.zeros(0, np.int64) if self.held is None else self.held.lengths

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors that hold memory."""
        return [] if self._held is None else self._held.pool.tensors

    @property
    def blocks(self) -> int:
        """Blocks in use, those that other caches use too included."""
        return 0 if self.held is None else self.held.used

    @property
    def used_bytes(self) -> int:
        """Bytes of `blocks`."""
        return 0 if self.held is None else self.held.used_bytes

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes note of a chunk; the attention that follows commits it.

        `key_states`: `[batch, kv_heads, tokens, head_dim]`. `value_states`: `[batch, kv_heads, tokens, value_dim]`.
        """
        if self._held is None:
            self.lazy_initialization(key_states, value_states)
        self.check_rows(key_states.shape[0])
        assert self._held is not None
        dtypes = self._held.pool.layout.dtype, key_states.dtype
        if dtypes[0] != dtypes[1]:
            held, given = (str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise UnsupportedError(
                f"the cache holds keys and values in {held}, and this forward makes them in {given}; go on in the dtype, and "
                "under the autocast, that the cache was filled in, or start a new one"
            )
        self._pending = key_states, value_states
        return key_states, value_states

    def replace_keys(self, key_states: torch.Tensor) -> None:
        """Has the keys of the running forward's chunk be these, less their centre, `[batch, kv_heads, tokens, head_dim]`."""
        assert self._pending is not None
        self._pending = key_states, self._pending[1]

    def check_rows(self, rows: int) -> None:
        """Refuses a chunk that cannot follow what the cache has taken in.

        Raises:
            UnsupportedError: a forward was left in its midst, or the cache has another number of rows.
        """
        if self._pending is not None:
            raise UnsupportedError(
                "this cache was left in the middle of a forward (an interrupt, or an attention that is not moacompress's); "
                "start a new one"
            )
        if rows != self.rows:
            raise UnsupportedError(f"the cache holds {self.rows} rows, the input has {rows}")

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes the number of rows, the dimensions and the device; no memory yet."""
        self.held = LayerBlocks.none(self.rules, key_states, value_states, self.shared_values, self._memory)
        self.is_initialized = True

    def blocks_held(self) -> LayerBlocks:
        """Returns its blocks; there are some."""
        assert self.held is not None
        return self.held

    def view(self) -> CacheView:
        """Returns what attention reads."""
        return self.blocks_held().view()

    def can_step(self, like: torch.Tensor, *, scored: bool = False) -> bool:
        """Whether a compiled call can take in one more token of every row: there is memory of the dtype of `like`.

        It knows of no values beside a block's own.

        `scored`: whether the call is given scores of the tokens, without which it knows of no gates.
        """
        return not self.shared_values and self.can_step_in_ring(like, scored=scored)

    def can_step_in_ring(self, like: torch.Tensor, *, scored: bool = False) -> bool:
        """As `can_step`, of a step on the device, which knows of values beside a block's own."""
        able = self._held is not None and self._held.has_memory_for(like)
        return able and (not self.rules.selects or (scored and self._continues))

    @property
    def _continues(self) -> bool:
        """Whether no step need be gone back on: what gates selected would not be known."""
        return not (self.record_past and self.rules.selects)

    def can_step_rows(self, hidden: torch.Tensor) -> bool:
        """Whether a step through all layers can: of as many rows as the hidden states, and no forward was left in its midst."""
        there = self._held is not None and self._held.has_memory_for(hidden) and self._continues
        return there and self._pending is None and hidden.shape[0] == self.rows

    def state(self, lag: int) -> CacheState:
        """Returns what a step through all layers reads and writes."""
        return self.blocks_held().state(lag)

    def stepped(self, call: StepCall) -> torch.Tensor:
        """Makes a call that takes in one more token of every row, all real, and gives it room where it lacks some.

        Returns:
            What the call returns.
        """
        held = self.blocks_held()
        with held.pool.lock:
            self.stepping = True
            while True:
                out, shortfall = call(held.state(self.lag))
                if shortfall is None:
                    break
                held.allocate(shortfall)
            self.columns += 1
            self.stepping = False
        return out

    def step_pending(self, call: StepCall) -> torch.Tensor:
        """As `stepped`, for the chunk of the running forward, which is then taken in."""
        assert self._pending is not None
        out = self.stepped(call)
        self._pending = None
        return out

    @property
    def ring(self) -> Ring | None:
        """The rings that its last token went into, or None."""
        return self._ring

    def step_in_ring(
        self,
        query: torch.Tensor,
        scores: Scores,
        gate_scores: torch.Tensor | None,
        backend: Backend,
        real: Bools | None = None,
    ) -> torch.Tensor | None:
        """Takes in the chunk of the running forward, one token of every row, and attends to it on the device.

        `query`: `[rows, heads, 1, head_dim]`. `gate_scores`: of the tokens, int16 `[rows, kv_heads]`; None where no rule
        selects. `backend`: that can; see `can_step_in_ring`. `real`: which of the tokens are, bool `[rows]`; None where all
        are. A padded query sees what its row's last real token sees.

        Returns:
            `[rows, 1, heads, value_dim]`; None, and nothing is done, where a row has no real token, or where rows are
            repeated time and again, as of beams, so that blocks are shared.
        """
        assert self._pending is not None
        assert self._held is not None
        if self._ring is None and self.columns < self._look_again:
            return None
        before = self._held.lengths if self._ring is None else self._ring.lengths
        if real is not None and not (before + real).all():
            return None
        if self._ring is None or self._ring.is_full:
            held = self.blocks_held()
            self._ring = ring_for(held, self.reserve, self.lag, backend, copies=not self._repeated)
        if self._ring is None:
            self._look_again = self.columns + RING_RETRY_TOKENS
            return None
        self.stepping = True
        out = self._ring.step(query, *self._pending, scores, gate_scores, real)
        self.lengths_before = before
        self._pending = None
        self.columns += 1
        self.stepping = False
        return out

    def count_steps(self, steps: int) -> None:
        """See `PlanCache.count_steps`; its last token went into rings."""
        assert self._ring is not None
        self._ring.count_steps(steps)
        self.columns += steps

    def arrays(self) -> tuple[Any, ...]:
        """Returns what a state and `can_step_rows` are made of: they say the same as long as these are the same objects."""
        held = self.blocks_held()
        selected = None if held.selected is None else held.selected.ids
        return held.table.ids, held.lengths, held.runs, held.pool.refs, self._pending, selected, held.left

    @property
    def lock(self) -> threading.RLock:
        """Of the memory, which forks share; held while a state is used."""
        assert self._held is not None
        return self._held.pool.lock

    def commit(
        self, chunk: Chunk, scores: torch.Tensor | None = None, schedule: EvictionSchedule | None = None
    ) -> None:
        """Takes in the chunk of the running forward, and frees every block that no later query sees.

        `scores`: of its tokens, int16 `[rows, kv_heads, columns]`, where rules select. `schedule`: what becomes of the selected
        tokens in it, where that is known already.
        """
        assert self._pending is not None
        there = self.columns + chunk.columns
        to_come = reserved(self.reserve, there) - there
        held = self.blocks_held()
        if self.record_past and scores is not None:
            self._commit_in_parts(held, chunk, scores)
            return
        if self.shared_values:
            # of a single token nothing that it evicts is seen
            past = chunk.columns > 1 and held.lengths.any()
            self._before = held.fork() if past else None
            self.lengths_before = held.lengths
        commit(held, *self._pending, chunk, scores=scores, schedule=schedule, lag=self.lag, to_come=to_come)
        self.columns += chunk.columns
        self._pending = None

    def _commit_in_parts(self, held: LayerBlocks, chunk: Chunk, scores: torch.Tensor) -> None:
        """Takes in the chunk of the running forward, and remembers what is selected every `LAG` tokens."""
        assert self._pending is not None
        for first in range(0, chunk.columns, LAG):
            at = slice(first, min(first + LAG, chunk.columns))
            key, value = (tensor[:, :, at] for tensor in self._pending)
            if not held.past or (held.lengths + (at.stop - first) - held.past[-1].lengths > LAG).any():
                remember(held, self.lag)
            commit(held, key, value, chunk.part(at), scores=scores[:, :, at], lag=self.lag)
        self.columns += chunk.columns
        self._pending = None

    def before(self) -> LayerBlocks:
        """Returns the blocks as they were before the chunk of the running forward, for layers that share their keys."""
        return self._before or self.blocks_held()

    def forget_before(self) -> None:
        """Gives back what only the layers that share its keys still needed."""
        if self._before is not None:
            self._before.give_back()
            self._before = None

    def reset(self) -> None:
        """Empties the layer."""
        if self.held is not None:
            self.held.give_back()
        self._clear()

    def select(self, rows: Ints) -> None:
        """Makes the given rows, with repeats, the rows of the cache; they share their blocks until they are written to."""
        self._repeated |= self._ring is not None and len(np.unique(rows)) < len(rows)
        if self.held is not None:
            self.held.select(rows)

    def check_roll_back(self, counts: Ints) -> None:
        """Refuses to forget so many of the last real tokens of every row, `[rows]`.

        Raises:
            UnsupportedError: what the earlier length needs is gone.
        """
        held = self.blocks_held()
        lengths = held.lengths - counts
        needed, runs = held.rules.block_runs(lengths), held.runs
        gone = needed[-1, BEGIN] < runs[-1, BEGIN]
        for number in range(len(needed) - 1):
            begin, end = needed[number]
            # needed blocks between those held and the run after them
            apart = np.minimum(end, runs[number + 1, BEGIN]) > np.maximum(begin, runs[number, END])
            gone |= (end > begin) & ((begin < runs[number, BEGIN]) | apart)
        unknown = held.selected is not None and bool(counts.any()) and not can_go_back(held, lengths)
        if bool((lengths < 0).any() or gone.any() or unknown):
            kept = (
                f"the last {LAG} tokens can be rolled back" if self.record_past else "nothing was kept to roll back to"
            )
            raise UnsupportedError(
                f"a compressed cache cannot be rolled back by {int(counts.max())} tokens: evicted keys are gone and {kept}; "
                "draft fewer tokens at a time, or fork() the cache before what is to be undone"
            )

    def roll_back(self, counts: Ints, columns: int) -> None:
        """Forgets the last real tokens of every row, `counts` `[rows]`, that were `columns` with padding.

        Raises:
            UnsupportedError: see `check_roll_back`.
        """
        self.check_roll_back(counts)
        held = self.blocks_held()
        if held.selected is not None and counts.any():
            go_back(held, held.lengths - counts)
        held.roll_back(held.lengths - counts)
        self.columns -= columns

    def fork(self) -> PlanCacheLayer:
        """Returns a layer with the same content; blocks are shared until one of the two writes to them."""
        return self._with(None if self.held is None else self.held.fork())

    def compact(self) -> PlanCacheLayer:
        """Returns a layer with the same content and memory of its own, just the blocks in use."""
        return self._with(None if self.held is None else LayerBlocks.unpack(self.rules, self.held.pack()))

    def _with(self, held: LayerBlocks | None) -> PlanCacheLayer:
        if self._pending is not None:
            raise UnsupportedError("a cache cannot be forked in the middle of a forward")
        other = PlanCacheLayer(self.rules, self.reserve, self.shared_values)
        other.record_past = self.record_past
        if held is not None:
            other._use(held, self.columns)
        return other

    def beside(self) -> PlanCacheLayer:
        """Returns an empty layer that takes its blocks from the same memory, where there is some yet."""
        other = PlanCacheLayer(self.rules, None, self.shared_values)
        other._memory = self._memory if self.held is None else self.held.pool
        return other

    def can_join(self, other: CacheLayer) -> bool:
        """Whether the rows of another layer may become rows of this one: they lie in the same memory, and none is recorded."""
        ours, theirs = self.held, other.held if isinstance(other, PlanCacheLayer) else None
        there = ours is not None and theirs is not None and ours.pool is theirs.pool
        return there and not self.record_past and not other.record_past

    def join(self, other: CacheLayer, columns: int) -> None:
        """Takes the rows of another layer behind its own; see `can_join`."""
        assert isinstance(other, PlanCacheLayer)
        self._use(self.blocks_held().join(other.blocks_held()), columns)

    def _use(self, held: LayerBlocks, columns: int) -> None:
        self.held, self.columns, self.is_initialized = held, columns, True

    def __reduce__(self) -> tuple[Any, ...]:
        if self._pending is not None or self.stepping:
            raise UnsupportedError("a cache cannot be pickled in the middle of a forward")
        packed = None if self.held is None else self.held.pack()
        return type(self), (self.rules, self.reserve, self.shared_values), (self.record_past, self.columns, packed)

    def __setstate__(self, state: tuple[bool, int, Any]) -> None:
        self.record_past, columns, packed = state
        if packed is not None:
            self._use(LayerBlocks.unpack(self.rules, packed), columns)
