"""The most KV bytes that budgets let a plan take at each length, the least that each layer keeps, and whether any plan fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from moacompress.core.arrays import Bools, Floats, Ints
from moacompress.core.errors import BudgetError, InfeasibleBudgetError
from moacompress.rules.budget import Budget, byte_limits, check_feasible, format_length, memory_budgets
from moacompress.rules.kv_bytes import candidate_kv_bytes, head_kv_bytes
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.share import LayerShares

Limits: TypeAlias = Mapping[int, int]
"""The most KV bytes of one row at each length, tokens; all must hold. Budgets give the shortest length first."""


def layer_floors(floors: Mapping[int, float], shape: ModelShape) -> Floats:
    """Returns the smallest share of its KV bytes that every layer keeps, float64 [layers]; 0 where none is asked for.

    Raises:
        BudgetError: a layer that the model does not have.
    """
    found = np.zeros(shape.layers)
    for layer, share in floors.items():
        if layer >= shape.layers:
            raise BudgetError(
                f"a floor is asked for in layer {layer}; the model has the layers 0 to {shape.layers - 1}"
            )
        found[layer] = share
    return found


def floored(sizes: Ints, floors: Floats) -> Ints:
    """Returns the bytes with every rule that keeps less than its layer's floor standing for the full rule.

    `sizes` are `[lengths, layers, kv_heads, rules]`, the full rule first, and `floors` `[layers]`.
    """
    return np.where(below_floors(sizes, floors), sizes[..., :1], sizes)


def below_floors(sizes: Ints, floors: Floats) -> Bools:
    """Returns whether a rule keeps less than its layer's floor at some length, [layers, kv_heads, rules]; see `floored`."""
    return np.asarray((sizes < np.ceil(floors[:, None, None] * sizes[..., :1])).any(axis=0))


def meets(plan: Plan, floors: Floats, lengths: Iterable[int]) -> bool:
    """Returns whether every KV head keeps at least its layer's floor, [layers], at every length."""
    for row, native, floor in zip(plan.rules, plan.model.native_windows, floors, strict=True):
        for n in lengths if floor else ():
            full, *sizes = (head_kv_bytes(plan.model, rule, plan.min_window, native, n) for rule in (Rule.FULL, *row))
            if min(sizes) < floor * full:
                return False
    return True


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
    floors: Floats | None = None,
    shares: LayerShares = (),
    weights: int | None = None,
) -> Limits:
    """Returns the limits of budgets, which all must hold; one without a length holds at `lengths`.

    `rules` are the candidates, for the smallest plan there is; `floors` and `shares` are as in `smallest_kv_bytes`. `weights`
    are the bytes of the checkpoint's weight files, which budgets of memory count too; None where they are not known.

    Raises:
        BudgetError: no budget; or one of memory where nothing is known of the weights.
        InfeasibleBudgetError: no plan of these rules fits; says the smallest budget that works.
    """

    def smallest(at: Sequence[int]) -> dict[int, int]:
        return smallest_kv_bytes(shape, rules, min_window, at, floors, shares)

    for budget in memory_budgets(budgets):
        if weights is None:
            raise BudgetError(
                f"the budget {budget.text} is of weights and cache together, which `search` and `compress` know; give one of "
                "KV bytes here, such as 25%"
            )
        limit, length = budget.bytes or 0, budget.length or 0
        least = smallest([length])[length]
        if weights + least > limit:
            raise InfeasibleBudgetError(
                f"no plan fits {budget.text}, {limit:,} bytes: weights take {weights:,} as they are and the KV cache at least "
                f"{least:,} at {format_length(length)} tokens, {weights + least:,} in all; ask for at least that, or "
                "profile smaller weights (--weights int8 or int4)"
            )
    limits = byte_limits(budgets, shape, lengths, weights)
    check_feasible(limits, smallest(list(limits)), shape)
    return limits


def smallest_kv_bytes(
    shape: ModelShape,
    rules: Sequence[Rule],
    min_window: int,
    lengths: Sequence[int],
    floors: Floats | None = None,
    shares: LayerShares = (),
) -> dict[int, int]:
    """Returns the KV bytes of the smallest plan at each length.

    `floors` are the smallest share that every layer keeps, `[layers]`, and `shares` what each takes from an earlier one. KV
    heads of different layers that are to have one rule may take more, where floors differ; the solver says so.
    """
    sizes = candidate_kv_bytes(shape, rules, min_window, lengths, shares)
    smallest = (sizes if floors is None else floored(sizes, floors)).min(axis=-1).sum(axis=(1, 2))
    return {n: int(total) for n, total in zip(lengths, smallest, strict=True)}
