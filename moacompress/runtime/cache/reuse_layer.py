"""The cache of a layer that shares its anchor's keys: its values lie in the anchor's blocks, beside the anchor's own."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch

from moacompress.core.arrays import Ints
from moacompress.core.errors import UnsupportedError
from moacompress.kernels.arguments import CacheView, Scores
from moacompress.kernels.bound import BoundReuse
from moacompress.rules.share import Share
from moacompress.runtime.cache.commit import write_shared_values
from moacompress.runtime.cache.layer_cache import CacheLayer, PlanCacheLayer
from moacompress.runtime.cache.real_tokens import Chunk
from moacompress.runtime.cache.ring import Ring


class ReuseCacheLayer(CacheLayer):
    """The cache of a reuse layer: it has no memory of its own.

    What selects, forks and forgets rows is done by the anchor alone.

    `value_sets`: which of the values beside the anchor's own are those of each KV head, `[kv_heads]`. `last`: whether no later
    layer uses the same anchor.
    """

    tensors: tuple[torch.Tensor, ...] = ()
    used_bytes = blocks = 0

    def __init__(self, share: Share, value_sets: tuple[int, ...], last: bool) -> None:
        super().__init__()
        self.share, self.value_sets, self.last = share, value_sets, last
        self.anchor: PlanCacheLayer
        self._heads = np.array(share.head_map, np.int64), np.array(value_sets, np.int64)
        self.is_initialized = False
        self._pending: torch.Tensor | None = None
        self._in_ring: tuple[Ring, BoundReuse] | None = None

    @property
    def _is_behind(self) -> bool:
        """Whether the anchor has taken in the chunk of the running forward and this layer has not."""
        return self.columns != self.anchor.columns

    @property
    def lengths(self) -> Ints:
        """Cached tokens of every row, int64 `[rows]`: those of its anchor."""
        return self.anchor.lengths_before if self._is_behind else self.anchor.lengths

    @property
    def rows(self) -> int:
        """Rows in the cache."""
        return self.anchor.rows

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes note of a chunk's values; see `PlanCacheLayer.update`."""
        self.lazy_initialization(key_states, value_states)
        self.check_rows(key_states.shape[0])
        self._pending = value_states
        return key_states, value_states

    def check_rows(self, rows: int) -> None:
        """Refuses a chunk that the anchor has not just taken in.

        Raises:
            UnsupportedError: a forward was left in its midst, or the chunk has another number of rows.
        """
        if self._pending is not None or not self._is_behind or rows != self.rows:
            raise UnsupportedError("this cache was left in the middle of a forward (an interrupt); start a new one")

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes note that there is something; memory is the anchor's."""
        self.is_initialized = True

    def view(self) -> CacheView:
        """Returns what attention reads: before its values are taken in, that is without the chunk of the running forward."""
        held = self.anchor.before() if self._is_behind else self.anchor.blocks_held()
        return held.view_shared_values(*self._heads)

    def can_step(self, like: torch.Tensor, *, scored: bool = False) -> bool:
        """No compiled call puts values beside others."""
        return False

    @property
    def can_step_in_ring(self) -> bool:
        """Whether its anchor has taken in the token of the running forward into rings, and has not left them since."""
        return self.anchor.ring is not None and self._is_behind

    def step_in_ring(self, scores: Scores) -> torch.Tensor:
        """Takes in the values of the token of the running forward, and attends to it as its anchor did; no key is read.

        Returns:
            `[rows, 1, heads, value_dim]`.
        """
        ring = self.anchor.ring
        assert ring is not None
        assert self._pending is not None
        if self._in_ring is None or self._in_ring[0] is not ring:
            self._in_ring = ring, ring.reuse(*self._heads)
        out = self._in_ring[1].step(self._pending, scores=scores)
        self.columns += 1
        self._pending = None
        return out

    def count_steps(self, steps: int) -> None:
        """See `PlanCache.count_steps`; tokens are its anchor's."""
        self.columns += steps

    def can_step_rows(self, hidden: torch.Tensor) -> bool:
        """Whether its anchor can step so many rows, and no forward was left in its midst."""
        return self._pending is None and not self._is_behind

    def state(self, lag: int) -> None:
        """It has none of its own; see `PlanCacheLayer`."""

    def arrays(self) -> tuple[Any, ...]:
        """Returns the tables, lengths and runs of its anchor, which kernels read."""
        return self.anchor, self._pending

    @property
    def lock(self) -> threading.RLock:
        """The lock of its anchor's pool."""
        return self.anchor.lock

    def commit(self, chunk: Chunk, scores: None = None, schedule: None = None) -> None:
        """Takes in the values of the chunk of the running forward; layers that share attention have no gates."""
        assert self._pending is not None
        write_shared_values(self.anchor.blocks_held(), self._pending, self.anchor.lengths_before, chunk, *self._heads)
        self.columns += chunk.columns
        self._pending = None
        if self.last:
            self.anchor.forget_before()

    def select(self, rows: Ints) -> None:
        """Does nothing for `[new rows]`: what is cached is its anchor's."""

    def check_roll_back(self, counts: Ints) -> None:
        """The anchor refuses what cannot be forgotten."""

    def roll_back(self, counts: Ints, columns: int) -> None:
        """Takes columns back; the tokens, int64 `[rows]`, are its anchor's."""
        self.columns -= columns

    def reset(self) -> None:
        """Empties the layer."""
        self.columns, self._pending, self.is_initialized, self._in_ring = 0, None, False, None

    def beside(self) -> ReuseCacheLayer:
        """Returns an empty layer for a cache beside this one, whose anchor it is to be given."""
        return ReuseCacheLayer(self.share, self.value_sets, self.last)

    def can_join(self, other: CacheLayer) -> bool:
        """Its anchor says whether rows may join."""
        return True

    def join(self, other: CacheLayer, columns: int) -> None:
        """Takes columns, tokens fed so far with padding; the rows are its anchor's."""
        self.columns = columns

    def fork(self) -> ReuseCacheLayer:
        """Returns a layer of the same content for a cache whose anchor is forked too, which it is to be given."""
        other = ReuseCacheLayer(self.share, self.value_sets, self.last)
        other.columns, other.record_past, other.is_initialized = self.columns, self.record_past, self.is_initialized
        return other

    def compact(self) -> ReuseCacheLayer:
        """As `fork`: what is cached is its anchor's."""
        return self.fork()

    def __getstate__(self) -> dict[str, Any]:
        if self._pending is not None:
            raise UnsupportedError("a cache cannot be pickled in the middle of a forward")
        return {name: value for name, value in self.__dict__.items() if name != "anchor"} | {"_in_ring": None}
