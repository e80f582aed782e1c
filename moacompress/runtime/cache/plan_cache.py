"""The KV cache of a compressed model: what transformers holds, hands to the model, and asks to reorder or roll back."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from moacompress.core.arrays import Bools, Ints
from moacompress.core.errors import UnsupportedError
from moacompress.rules.formats import find_format
from moacompress.rules.plan import Plan
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.share import reuse_layers_of, served, value_sets_of
from moacompress.runtime import autocast
from moacompress.runtime.cache.layer_cache import PlanCacheLayer
from moacompress.runtime.cache.reuse_layer import ReuseCacheLayer

_caches: weakref.WeakValueDictionary[int, PlanCache] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class PlanCache(Cache):
    """The KV cache of a compressed model.

    Args:
        plan: the plan of the model that will use it.
        reserve: tokens of a row, padding included, that there may be in the end; memory for them is taken at once, for
            `pool.AT_ONCE` to come at most, and more as it is needed.

    Attributes:
        plan_key: what the plan does; see `Plan.key`.
        real: which of the tokens fed so far are real, bool `[rows, columns]`; None while all are.
        sealed_layers: what the route through all layers knows of it, or None.
        step_routes: how many layers of forwards of one token went by each route, by its name; see `runtime.decode.routes`.
        handle: names the cache in a compiled model, whose graph holds tensors alone: int64 `[]`, see `find`.

    A cache can be pickled, to keep a prefix; what is read has memory of its own, and just the blocks in use.
    """

    layers: list[PlanCacheLayer | ReuseCacheLayer]  # type: ignore[assignment]

    def __init__(self, plan: Plan, reserve: int | None = None) -> None:
        self.plan_key = plan.key()
        self.real: Bools | None = None
        self.sealed_layers: Any = None
        self._positions: tuple[int, Ints] | None = None
        self._trusted: torch.Tensor | None = None
        self._is_user_defined = False
        self.step_routes: Counter[str] = Counter()
        super().__init__(layers=[_layer(plan, layer, reserve) for layer in range(plan.model.layers)])
        self._link()
        self._take_handle()

    def _link(self) -> None:
        """Gives every layer that shares keys its anchor."""
        for layer in self.layers:
            if isinstance(layer, ReuseCacheLayer):
                anchor = self.layers[layer.share.anchor]
                assert isinstance(anchor, PlanCacheLayer)
                layer.anchor = anchor

    def _take_handle(self) -> None:
        number = next(_numbers)
        self.handle = torch.tensor(number, device="cpu")
        _caches[number] = self

    @staticmethod
    def find(handle: torch.Tensor) -> PlanCache:
        """Returns the cache of a handle."""
        return _caches[int(handle)]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes note of a layer's chunk; see `PlanCacheLayer.update`."""
        if torch.compiler.is_compiling():  # the operator that attends takes the chunk itself
            return key_states, value_states
        key_states, value_states = autocast.as_computed(key_states, value_states)
        return self.layers[layer_idx].update(key_states, value_states)

    def check_whole(self) -> None:
        """Refuses a cache whose layers do not agree, or are in the middle of a step: a forward was interrupted.

        Raises:
            UnsupportedError: they do not.
        """
        if len({layer.columns for layer in self.layers}) > 1 or any(layer.stepping for layer in self.layers):
            raise UnsupportedError("this cache was left in the middle of a forward (an interrupt); start a new one")

    def seen(self, rows: int) -> Bools:
        """Returns which of the tokens fed so far are real, bool `[rows, columns]`."""
        columns = self.get_seq_length()
        if self.real is None:
            return np.ones((rows, columns), np.bool_)
        return self.real[:, :columns]

    @property
    def last_position(self) -> Ints | None:
        """Position id of the last token of every row, `[rows]`, -1 where it is not known; None where the caller gave none."""
        if self._positions is None or self._positions[0] != self.get_seq_length():  # a forward that never ended
            return None
        return self._positions[1]

    def expect(self, real: Bools | None, last_position: Ints | None, tokens: int) -> None:
        """Takes note of what a forward that begins will have added to the cache when it ends."""
        self.real = real
        self._positions = None if last_position is None else (self.get_seq_length() + tokens, last_position)

    def trust_positions(self, positions: torch.Tensor) -> None:
        """Has forwards that are given this very tensor of position ids take them as they are: the host does not read them.

        `positions`: int64 `[rows, 1]`; counts on by itself in every step.
        """
        self._trusted = positions

    def trusts(self, positions: Any) -> bool:
        """Whether position ids are taken as they are; see `trust_positions`."""
        return positions is not None and positions is self._trusted

    @property
    def is_full(self) -> bool:
        """Whether a step that the device makes by itself would not go into the rings any more."""
        return any(layer.is_full for layer in self.layers if isinstance(layer, PlanCacheLayer))

    def count_steps(self, steps: int) -> None:
        """Takes note of steps of one real token a row that the device has made by itself, into rings, since the last one."""
        if self.real is not None:
            more = np.ones((len(self.real), steps), np.bool_)
            self.real = np.concatenate([self.real[:, : self.get_seq_length()], more], axis=1)
        self._positions = None
        for layer in self.layers:
            layer.count_steps(steps)

    def kv_bytes(self) -> int:
        """Returns the bytes of all tensors that hold memory for the cache, each storage counted once."""
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for layer in self.layers
            for tensor in layer.tensors
        }
        return sum(storages.values())

    def used_bytes(self) -> int:
        """Returns the bytes of the blocks in use: what the plan says where nothing is shared, padded or recorded."""
        return sum(layer.used_bytes for layer in self.layers)

    def fork(self) -> PlanCache:
        """Returns a cache with the same content, for another continuation of the same prefix.

        The two share memory until one of them writes to a block. A fork can be used in another thread than its origin.

        Raises:
            UnsupportedError: a forward is running.
        """
        self.check_whole()
        return self._with([layer.fork() for layer in self.layers])

    def compact(self) -> PlanCache:
        """Returns a cache with the same content and memory of its own, just the blocks in use, to be kept.

        Raises:
            UnsupportedError: a forward is running.
        """
        self.check_whole()
        return self._with([layer.compact() for layer in self.layers])

    def _with(self, layers: list[PlanCacheLayer | ReuseCacheLayer]) -> PlanCache:
        """Returns a cache like this with layers of its own."""
        other = PlanCache.__new__(PlanCache)
        other.__dict__.update(self.__dict__)
        other.layers, other.sealed_layers, other._trusted = layers, None, None
        other._link()
        other.step_routes = self.step_routes.copy()
        other._take_handle()
        return other

    def beside(self) -> PlanCache:
        """Returns an empty cache that takes its blocks from the same memory, so that its rows can `join` this one."""
        other = self._with([layer.beside() for layer in self.layers])
        other.real = other._positions = None
        other.step_routes = Counter()
        return other

    def join(self, other: PlanCache) -> None:
        """Takes the rows of a cache from `beside` behind its own; the other one is then empty. No key or value is moved.

        Rows of other lengths are padded on the left, as those of a batch are; columns that no row needs any more go.

        Raises:
            UnsupportedError: a forward is running, or the other cache is empty, has memory of its own, or belongs to another
                plan.
        """
        self.check_whole()
        other.check_whole()
        layers = list(zip(self.layers, other.layers, strict=False))
        if self.plan_key != other.plan_key or not all(layer.can_join(one) for layer, one in layers):
            raise UnsupportedError(
                "rows join a cache from one that was made by its `beside`, in whose memory they lie, and that took in their "
                "prompts"
            )
        seen = [one.seen(one.batch_size) for one in (self, other)]
        columns = max(each.shape[1] for each in seen)
        real = np.concatenate([np.pad(each, ((0, 0), (columns - each.shape[1], 0))) for each in seen])
        real = real[:, int(np.argmax(real.any(axis=0))) :]
        rows = [
            np.full(one.batch_size, -1) if one.last_position is None else one.last_position for one in (self, other)
        ]
        for layer, one in layers:
            layer.join(one, real.shape[1])
        self.real, self._positions = None if real.all() else real, (real.shape[1], np.concatenate(rows))
        self.sealed_layers = None
        other.reset()

    def __copy__(self) -> PlanCache:
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> PlanCache:
        return self.fork()

    def __getstate__(self) -> dict[str, Any]:
        self.check_whole()
        return {
            name: value for name, value in self.__dict__.items() if name not in ("sealed_layers", "handle", "_trusted")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, sealed_layers=None, _trusted=None)
        self._link()
        self._take_handle()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens, as long as what the plan needs of the ones before them is still there.

        While transformers drafts (assisted decoding, prompt lookup) a little more than the plan's is kept for that.

        Args:
            tokens_to_remove: how many, as a number of at most 0 (transformers' convention).

        Raises:
            UnsupportedError: evicted keys would be needed, or the number is positive or more than there are.
        """
        tokens_to_remove = int(tokens_to_remove)  # before transformers 5.18 it may be a tensor
        columns = self.get_seq_length()
        if tokens_to_remove > 0 or -tokens_to_remove > columns:
            raise UnsupportedError(
                f"crop({tokens_to_remove}) is not possible on a cache of {columns} tokens: it takes the number of tokens to "
                "remove, as a number between that many below 0, and 0"
            )
        count = -tokens_to_remove
        if not count or not self.layers[0].is_initialized:
            return
        last = self.last_position
        removed = self.seen(self.batch_size)[:, columns - count :].sum(axis=1, dtype=np.int64)
        for layer in self.layers:  # all or none
            layer.check_roll_back(removed)
        for layer in self.layers:
            layer.roll_back(removed, count)
        if self.real is not None:
            self.real = self.real[:, : columns - count]
        self._positions = None if last is None else (columns - count, np.where(last < 0, -1, last - removed))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Makes row `beam_idx[i]` row i; rows of the same origin share blocks."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._select(beam_idx.detach().cpu().numpy())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the given rows of the batch, in that order."""
        super().batch_select_indices(indices)
        self._select(indices.detach().cpu().numpy())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch; the copies share blocks."""
        rows = max(self.batch_size, 0)
        super().batch_repeat_interleave(repeats)
        self._select(np.arange(rows).repeat(repeats))

    def reset(self) -> None:
        """Empties the cache."""
        super().reset()  # type: ignore[no-untyped-call]
        self.real = self._positions = self.sealed_layers = None

    def _select(self, rows: Any) -> None:
        if self.real is not None:
            self.real = self.real[rows]
        if self._positions is not None:
            self._positions = self._positions[0], self._positions[1][rows]


def _layer(plan: Plan, layer: int, reserve: int | None) -> PlanCacheLayer | ReuseCacheLayer:
    """Returns the empty cache of a layer."""
    share = plan.share(layer)
    if share is None:
        served_here = served(plan.shares, layer, plan.model.kv_heads)
        shared_values = tuple(
            tuple(find_format(plan.rules[reuse_layer][head].value_format).code for reuse_layer, head in each)
            for each in served_here
        )
        rules = RuleTable.of(plan.rules[layer], plan.min_window, plan.model.native_windows[layer])
        return PlanCacheLayer(rules, reserve, shared_values if any(shared_values) else ())
    return ReuseCacheLayer(
        share, value_sets_of(plan.shares, layer), layer == reuse_layers_of(plan.shares, share.anchor)[-1]
    )
