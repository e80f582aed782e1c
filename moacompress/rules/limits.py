"""The limits that budgets set: the most KV bytes that a plan may take at each length, and whether any plan is within them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from moacompress.core.arrays import Ints
from moacompress.core.errors import BudgetError, InfeasibleBudgetError
from moacompress.rules.budget import Budget, byte_limits, check_feasible, format_length, memory_budgets
from moacompress.rules.cost import Shares, smallest_bytes
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.share import LayerShares

Limits: TypeAlias = Mapping[int, int]
"""The most KV bytes of one row at each length, tokens; all must hold. Budgets give the shortest length first."""


def limit_array(limits: Limits) -> Ints:
    """Returns the most KV bytes at each length, int64 `[lengths]`."""
    return np.array(list(limits.values()), np.int64)


def is_within(plan: Plan, limits: Limits) -> bool:
    """Returns whether a plan takes no more than the limits at each length."""
    return all(plan.kv_bytes(n) <= limit for n, limit in limits.items())


def budget_limits(
    budgets: Sequence[Budget],
    shape: ModelShape,
    lengths: Sequence[int],
    rules: Sequence[Rule],
    min_window: int,
    floors: Shares | None = None,
    shares: LayerShares = (),
    weights: int | None = None,
) -> Limits:
    """Returns the limits of budgets, which all must hold.

    Args:
        budgets: as asked for.
        shape: the model.
        lengths: profiled lengths, where a budget without a length holds.
        rules: candidate rules, for the smallest plan there is.
        min_window: smallest window, tokens.
        floors: smallest share that every layer keeps, [layers]; none by default.
        shares: what each layer takes from an earlier one.
        weights: bytes of the checkpoint's weight files, which budgets of memory count too; None where they are not known.

    Raises:
        BudgetError: no budget; or one of memory where nothing is known of the weights.
        InfeasibleBudgetError: no plan of these rules fits; says the smallest budget that works.
    """

    def smallest(at: Sequence[int]) -> dict[int, int]:
        return smallest_bytes(shape, rules, min_window, at, floors, shares)

    for budget in memory_budgets(budgets):
        if weights is None:
            raise BudgetError(
                f"the budget {budget.text} is of weights and cache together, which `search` and `compress` know; give one of "
                "KV bytes here, such as 25%"
            )
        length = budget.length or 0
        _check_memory(budget, weights, smallest([length])[length])
    limits = byte_limits(budgets, shape, lengths, weights)
    check_feasible(limits, smallest(list(limits)), shape)
    return limits


def _check_memory(budget: Budget, weights: int, smallest: int) -> None:
    """Refuses a budget of memory that weights and the smallest cache, KV bytes, exceed.

    Raises:
        InfeasibleBudgetError: says what each of them takes.
    """
    limit, length = budget.bytes or 0, budget.length or 0
    if weights + smallest <= limit:
        return
    raise InfeasibleBudgetError(
        f"no plan fits {budget.text}, {limit:,} bytes: weights take {weights:,} as they are and the KV cache at least "
        f"{smallest:,} at {format_length(length)} tokens, {weights + smallest:,} in all; ask for at least that, or "
        "profile smaller weights (--weights int8 or int4)"
    )
