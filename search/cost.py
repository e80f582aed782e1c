"""What a rule costs in cache slots, exactly, and whether a budget can be met at all.

All numbers are integers from `moacompress.plan`, so that the solver, the plan and the cache agree to the byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from moacompress.budget import Budget, byte_limits, check_feasible
from moacompress.plan import ModelShape, Rule, slots

Ints: TypeAlias = npt.NDArray[np.int64]


def slot_table(shape: ModelShape, rules: Sequence[Rule], min_window: int, lengths: Sequence[int]) -> Ints:
    """Returns the slots that every KV head takes under every rule.

    Args:
        shape: for layers, KV heads and native windows.
        rules: candidate rules.
        min_window: smallest window, tokens.
        lengths: tokens so far.

    Returns:
        int64 [lengths, layers, kv_heads, rules], tokens; exactly `moacompress.plan.slots`.
    """
    sink, alpha, beta_q = (np.array([getattr(rule, name) for rule in rules], np.int64) for name in Rule.__match_args__)
    n = np.array(lengths, np.int64)[:, None]
    by_native = {
        native: np.asarray(slots(n, sink, alpha, beta_q, min_window, native), np.int64)
        for native in set(shape.native_windows)
    }
    layers = np.stack([by_native[native] for native in shape.native_windows], axis=1)
    return np.repeat(layers[:, :, None, :], shape.kv_heads, axis=2)


def budget_limits(
    budgets: Sequence[Budget], shape: ModelShape, lengths: Sequence[int], rules: Sequence[Rule], min_window: int
) -> dict[int, int]:
    """Returns the most KV bytes at every length that the budgets restrict, ascending.

    Args:
        budgets: all must hold.
        shape: the model.
        lengths: profiled lengths, where a budget without a length holds.
        rules: candidate rules, for the smallest plan there is.
        min_window: smallest window, tokens.

    Raises:
        InfeasibleBudgetError: no plan of these rules fits; says the smallest budget that works.
    """
    limits = byte_limits(budgets, shape, lengths)
    check_feasible(limits, smallest_bytes(shape, rules, min_window, list(limits)), shape)
    return limits


def smallest_bytes(shape: ModelShape, rules: Sequence[Rule], min_window: int, lengths: Sequence[int]) -> dict[int, int]:
    """Returns the KV bytes of the smallest plan at each length."""
    smallest = slot_table(shape, rules, min_window, lengths).min(axis=-1).sum(axis=(1, 2))
    return {n: int(total) * shape.slot_bytes for n, total in zip(lengths, smallest, strict=True)}


def slot_limits(limits: Mapping[int, int], shape: ModelShape) -> Ints:
    """Returns byte limits as whole slots, int64 [lengths]."""
    return np.array([limit // shape.slot_bytes for limit in limits.values()], np.int64)
