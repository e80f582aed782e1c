"""KV bytes: what keys and values take in a cache, counted here and nowhere else.

They follow from a model's shape, rules and a number of tokens, in integers: plans, budgets, the solver, reports and servers
agree to the byte. A cache has memory for whole blocks of 16 tokens. What a cache in memory has allocated, it says itself.
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
    """Returns the KV bytes of one KV head.

    Args:
        shape: of the model.
        rule: of the KV head.
        min_window: smallest window of the plan, tokens.
        native_window: the layer's own sliding window, tokens.
        n: tokens so far, an int or an int64 array.
        reuses: whether the layer shares attention and so keeps values alone.

    Returns:
        Of the type and shape of `n`.
    """
    return rule.slots(n, min_window, native_window) * shape.token_bytes(rule, reuses=reuses)


def dense_kv_bytes(shape: ModelShape, n: Any) -> Any:
    """Returns the KV bytes of the dense model at `n` tokens, an int or an int64 array; native windows are respected."""
    layers = Counter(shape.native_windows)
    each = (count * head_kv_bytes(shape, Rule.FULL, MIN_WINDOWS[0], native, n) for native, count in layers.items())
    return shape.kv_heads * sum(each)


def kv_bytes(
    shape: ModelShape, rules: Sequence[Sequence[Rule]], min_window: int, n: Any, shares: LayerShares = ()
) -> Any:
    """Returns the KV bytes of all layers.

    Args:
        shape: of the model.
        rules: `rules[layer][kv_head]`.
        min_window: smallest window, tokens.
        n: tokens so far, an int or an int64 array.
        shares: what each layer takes from an earlier one; empty for nothing.

    Returns:
        Of the type and shape of `n`.
    """
    heads = Counter(
        (rule, native, reuses)
        for row, (native, reuses) in zip(rules, _layers(shape, shares), strict=True)
        for rule in row
    )
    return sum(
        count * head_kv_bytes(shape, rule, min_window, native, n, reuses=reuses)
        for (rule, native, reuses), count in heads.items()
    )


def kv_bytes_of_heads(
    shape: ModelShape, rules: Sequence[Sequence[Rule]], min_window: int, n: int, shares: LayerShares = ()
) -> list[list[int]]:
    """Returns the KV bytes of every KV head, `[layer][kv_head]`; arguments are those of `kv_bytes`."""
    return [
        [int(head_kv_bytes(shape, rule, min_window, native, n, reuses=reuses)) for rule in row]
        for row, (native, reuses) in zip(rules, _layers(shape, shares), strict=True)
    ]


def candidate_kv_bytes(
    shape: ModelShape, rules: Sequence[Rule], min_window: int, lengths: Sequence[int], shares: LayerShares = ()
) -> Ints:
    """Returns the KV bytes of every KV head under every candidate rule.

    Args:
        shape: of the model.
        rules: candidates.
        min_window: smallest window, tokens.
        lengths: tokens so far.
        shares: what each layer takes from an earlier one; empty for nothing.

    Returns:
        int64 `[lengths, layers, kv_heads, rules]`.
    """
    n = np.array(lengths, np.int64)
    slots = {native: RuleTable.of(rules, min_window, native).slots(n) for native in set(shape.native_windows)}
    sizes = {
        reuses: np.array([shape.token_bytes(rule, reuses=reuses) for rule in rules], np.int64)
        for reuses in (False, True)
    }
    layers = [slots[native] * sizes[reuses] for native, reuses in _layers(shape, shares)]
    return np.repeat(np.stack(layers, axis=1)[:, :, None, :], shape.kv_heads, axis=2)


def _layers(shape: ModelShape, shares: LayerShares) -> Iterator[tuple[int | None, bool]]:
    """Yields the sliding window of each layer, tokens, and whether it reuses an earlier one's keys."""
    reuses = [share is not None for share in shares] or [False] * shape.layers
    return zip(shape.native_windows, reuses, strict=True)
