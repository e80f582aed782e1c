"""The KV cache of a compressed model: for every KV head the blocks that its rule still touches, and nothing more.

A forward attends over cache and chunk, then commits what stays, so a chunk may be longer than a window. KV heads of a layer
with the same rule share one pair of tensors, `[batch, heads, slots, dim]`, sorted by position: the sinks' blocks, then the
window's. Positions follow from the number of tokens by arithmetic, so there is no table to keep. Memory is exact: a block
that no later query can see is freed when the next block is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from moacompress.errors import UnsupportedError
from moacompress.kernels.reference import Keys
from moacompress.plan import BLOCK, Plan, Rule, block_runs


def rule_groups(rules: Sequence[Rule]) -> tuple[tuple[Rule, tuple[int, ...]], ...]:
    """Returns the KV heads of a layer by rule: they are attended to, and cached, together. Every full rule is one."""
    groups: dict[Rule, list[int]] = {}
    for head, rule in enumerate(rules):
        groups.setdefault(Rule.FULL if rule.is_full else rule, []).append(head)
    return tuple((rule, tuple(heads)) for rule, heads in groups.items())


class HeadStore:
    """Keys and values of the KV heads of a layer that share one rule.

    Attributes:
        rule: the rule.
        heads: indices of the KV heads.
    """

    def __init__(self, rule: Rule, heads: Sequence[int], min_window: int, native_window: int | None) -> None:
        self.rule = rule
        self.heads = list(heads)
        self._bounds = (min_window, native_window)
        self._runs = (0, 0, 0, 0)
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors that hold memory."""
        return [tensor for tensor in (self._keys, self._values) if tensor is not None]

    def with_chunk(self, key: torch.Tensor, value: torch.Tensor, n: int) -> Keys:
        """Returns the cached keys and values followed by a chunk's.

        Args:
            key: `[batch, heads, tokens, head_dim]`, of this store's heads.
            value: `[batch, heads, tokens, value_dim]`.
            n: tokens in the cache before the chunk.
        """
        if self._keys is None:
            return Keys(key, value, [(n, key.shape[2])])
        held = self.committed(n)
        keys, values = torch.cat((held.keys, key), 2), torch.cat((held.values, value), 2)
        return Keys(keys, values, [*held.pieces, (n, key.shape[2])])

    def committed(self, n: int) -> Keys:
        """Returns the cached keys and values at `n` tokens, without copying; something must have been committed."""
        assert self._keys is not None
        assert self._values is not None
        a, b, c, _ = self._runs
        pieces = [(a * BLOCK, (b - a) * BLOCK), (c * BLOCK, n - c * BLOCK)]
        used = sum(count for _, count in pieces)
        return Keys(self._keys[:, :, :used], self._values[:, :, :used], pieces)

    def commit(self, key: torch.Tensor, value: torch.Tensor, n: int) -> None:
        """Takes in a chunk and frees every block that no later query sees.

        Args:
            key: `[batch, heads, tokens, head_dim]`, of this store's heads.
            value: `[batch, heads, tokens, value_dim]`.
            n: tokens in the cache before the chunk.
        """
        total = n + key.shape[2]
        rule = self.rule
        runs = block_runs(total, rule.sink, rule.alpha, rule.beta_q, *self._bounds)
        if runs != self._runs or self._keys is None:
            self._keys = self._moved(self._keys, key, runs, n)
            self._values = self._moved(self._values, value, runs, n)
            self._runs = runs
        for store, chunk in ((self._keys, key), (self._values, value)):
            assert store is not None
            _write(store, chunk, runs, n)

    def select(self, rows: torch.Tensor) -> None:
        """Keeps the given rows of the batch, in that order."""
        if self._keys is not None and self._values is not None:
            self._keys, self._values = (t.index_select(0, rows.to(t.device)) for t in (self._keys, self._values))

    def reset(self) -> None:
        """Frees everything."""
        self._keys = self._values = None
        self._runs = (0, 0, 0, 0)

    def _moved(
        self, old: torch.Tensor | None, chunk: torch.Tensor, runs: tuple[int, int, int, int], n: int
    ) -> torch.Tensor:
        """Returns a store for `runs` that has the tokens of `old` which stay."""
        a, b, c, d = runs
        batch, heads, _, dim = chunk.shape
        new = chunk.new_zeros(batch, heads, (b - a + d - c) * BLOCK, dim)
        if old is not None:
            old_a, old_b, old_c, _ = self._runs
            end = -(-n // BLOCK)
            _write(new, old[:, :, : (old_b - old_a) * BLOCK], runs, old_a * BLOCK)
            _write(new, old[:, :, (old_b - old_a) * BLOCK :][:, :, : (end - old_c) * BLOCK], runs, old_c * BLOCK)
        return new


def _write(store: torch.Tensor, chunk: torch.Tensor, runs: tuple[int, int, int, int], n: int) -> None:
    """Copies the tokens of a chunk that starts at position `n` to where `runs` has room for them."""
    a, b, c, d = runs
    for low, high, offset in ((a, b, 0), (c, d, b - a)):
        start, end = max(low * BLOCK, n), min(high * BLOCK, n + chunk.shape[2])
        if start < end:
            at = start - low * BLOCK + offset * BLOCK
            store[:, :, at : at + end - start] = chunk[:, :, start - n : end - n]


class PlanCacheLayer(CacheLayerMixin):
    """The cache of one layer; the attention reads and commits it, transformers only asks for its length."""

    is_croppable = False
    is_compileable = False
    supports_early_init = False
    is_sliding = False

    def __init__(self, rules: Sequence[Rule], min_window: int, native_window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stores = [HeadStore(rule, heads, min_window, native_window) for rule, heads in rule_groups(rules)]
        self.tokens = 0
        self._batch = -1
        self._pending: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def batch_size(self) -> int:
        """Rows in the cache, -1 while it is empty."""
        return self._batch

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Marks the layer as in use."""
        self._batch = key_states.shape[0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes note of a chunk; the attention that follows commits it.

        Args:
            key_states: `[batch, kv_heads, tokens, head_dim]`.
            value_states: `[batch, kv_heads, tokens, value_dim]`.
            *args: ignored.
            **kwargs: ignored.
        """
        if self._pending is not None:
            raise UnsupportedError(
                "this cache was left in the middle of a forward (an interrupt, or an attention that is not moacompress's); "
                "start a new one"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self._batch:
            raise UnsupportedError(f"the cache holds {self._batch} rows, the input has {key_states.shape[0]}")
        self._pending = key_states, value_states
        return key_states, value_states

    def take_pending(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the chunk of the running forward; the caller commits it with `advance`."""
        assert self._pending is not None
        return self._pending

    def advance(self, tokens: int) -> None:
        """Ends the running forward: `tokens` more tokens are in the cache."""
        self.tokens += tokens
        self._pending = None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns `(kv_length, kv_offset)` as transformers asks for it; no mask is made from it."""
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Returns the number of tokens seen."""
        return self.tokens

    def get_max_length(self) -> int:
        """Returns -1: the cache grows as long as memory lasts."""
        return -1

    def reset(self) -> None:
        """Empties the layer."""
        for store in self.stores:
            store.reset()
        self.tokens, self._batch, self._pending, self.is_initialized = 0, -1, None, False

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the given rows of the batch, in that order."""
        for store in self.stores:
            store.select(indices)
        if self.is_initialized:
            self._batch = int(indices.shape[0])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self._batch).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Refused: beams are not supported."""
        raise UnsupportedError("beam search is not supported with a moacompress cache; use greedy search or sampling")

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: evicted keys can not come back.

        Args:
            tokens_to_remove: what was asked for; 0 is allowed.
        """
        if tokens_to_remove:
            raise UnsupportedError(
                "a moacompress cache can not be rolled back (assisted decoding, prompt lookup, crop): evicted keys are gone; "
                "decode without an assistant"
            )

    def activate_past_recording(self) -> None:
        """Refused: see `crop`."""
        self.crop(1)

    def offload(self) -> None:
        """Refused: the cache stays on its device."""
        raise UnsupportedError("an offloaded cache is not supported by moacompress; its own cache is small already")

    prefetch = offload


class PlanCache(Cache):
    """The KV cache of a compressed model.

    Args:
        plan: the plan of the model that will use it.
    """

    layers: list[PlanCacheLayer]  # type: ignore[assignment]

    def __init__(self, plan: Plan) -> None:
        self.plan_key = plan.key()
        self._is_user_defined = False
        layers = zip(plan.rules, plan.model.native_windows, strict=True)
        super().__init__(layers=[PlanCacheLayer(rules, plan.min_window, native) for rules, native in layers])

    def kv_bytes(self) -> int:
        """Returns the bytes of all live cache tensors, each storage counted once."""
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for layer in self.layers
            for store in layer.stores
            for tensor in store.tensors
        }
        return sum(storages.values())
