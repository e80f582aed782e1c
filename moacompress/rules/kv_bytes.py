"""KV bytes: what keys and values take in a cache, counted here and nowhere else.

They follow from a model's shape, rules and a number of tokens, in integers: plans, budgets, the solver, reports and servers
agree to the byte. A cache has memory for whole blocks of 16 tokens. What a cache in memory has allocated, it says itself.

`n` is the tokens so far, an int or an int64 array; what is returned for it has its type and shape. `shares` says what each
layer takes from an earlier one, and is empty for nothing: a layer that reuses keys has bytes of its values alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moacompress.core.arrays import Ints
from moacompress.rules.rule import MIN_WINDOWS, Rule
from moacompress.rules.rule_table import RuleTable

if TYPE_CHECKING:
    from moacompress.rules.model_shape import ModelShape
    from moacompress.rules.share import LayerShares


def head_kv_bytes(
    shape: ModelShape, rule: Rule, min_window: int, native_window: int | None, n: Any, *, reuses: bool = False
) -> Any:
    """Returns the KV bytes of one KV head, in a layer with this sliding window of its own."""
    return rule.slots(n, min_window, native_window) * shape.token_bytes(rule, reuses=reuses)


def kv_bytes(
    shape: ModelShape, rules: Sequence[Sequence[Rule]], min_window: int, n: Any, shares: LayerShares = ()
) -> Any:
    """Returns the KV bytes of all layers under `rules[layer][kv_head]`."""
    layers = zip(rules, _windows_and_reuse(shape, shares), strict=True)
    heads = Counter((rule, *layer) for row, layer in layers for rule in row)
    return sum(
        count * head_kv_bytes(shape, rule, min_window, native, n, reuses=reuses)
        for (rule, native, reuses), count in heads.items()
    )


def dense_kv_bytes(shape: ModelShape, n: Any) -> Any:
    """Returns the KV bytes of the dense model, whose layers keep no more than their own sliding windows."""
    layers = Counter(shape.native_windows).items()
    each = (count * head_kv_bytes(shape, Rule.FULL, MIN_WINDOWS[0], native, n) for native, count in layers)
    return shape.kv_heads * sum(each)


def candidate_kv_bytes(
    shape: ModelShape, rules: Sequence[Rule], min_window: int, lengths: Sequence[int], shares: LayerShares = ()
) -> Ints:
    """Returns the KV bytes of every KV head under every candidate rule, int64 `[lengths, layers, kv_heads, rules]`."""
    n = np.array(lengths, np.int64)
    slots = {native: RuleTable.of(rules, min_window, native).slots(n) for native in set(shape.native_windows)}
    whole, values = (np.array([shape.token_bytes(rule, reuses=reuses) for rule in rules]) for reuses in (False, True))
    layers = [slots[native] * (values if reuses else whole) for native, reuses in _windows_and_reuse(shape, shares)]
    return np.repeat(np.stack(layers, axis=1)[:, :, None, :], shape.kv_heads, axis=2)


def _windows_and_reuse(shape: ModelShape, shares: LayerShares) -> Iterator[tuple[int | None, bool]]:
    """Yields each layer's own sliding window, tokens, and whether it reuses an earlier layer's keys."""
    reuse = [share is not None for share in shares] or [False] * shape.layers
    return zip(shape.native_windows, reuse, strict=True)
