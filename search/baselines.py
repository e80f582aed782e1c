"""Plans that need no search, at the same bytes: what a found plan has to beat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from moacompress.budget import format_length
from moacompress.errors import InfeasibleBudgetError
from moacompress.plan import BETA_ONE, SINKS, ModelShape, Plan, Rule


def uniform_plan(shape: ModelShape, n: int, kv_bytes: int, sink: int, min_window: int = 32) -> Plan:
    """Returns the plan that gives every KV head the same sink and fixed window, the widest that fits.

    Args:
        shape: the model; native windows are respected.
        n: length at which the bytes count, tokens.
        kv_bytes: most KV bytes at `n`.
        sink: first tokens that every KV head keeps.
        min_window: smallest window, tokens.

    Raises:
        InfeasibleBudgetError: not even the smallest window fits.
    """
    plan = _fixed(shape, {n: kv_bytes}, sink, min_window)
    if plan is None:
        smallest = Plan.uniform(shape, Rule(sink, min_window, 0), min_window).kv_bytes(n)
        raise InfeasibleBudgetError(
            f"no uniform window with a sink of {sink} fits {kv_bytes:,} KV bytes at {format_length(n)} tokens: the "
            f"smallest, {min_window} tokens, takes {smallest:,}"
        )
    return plan


def uniform_plans(
    shape: ModelShape, limits: Mapping[int, int], min_window: int = 32, sinks: Sequence[int] = SINKS
) -> list[Plan]:
    """Returns the uniform plans within byte limits.

    For every sink the widest fixed window and, for several lengths, the widest elastic one.

    Args:
        shape: the model.
        limits: most KV bytes at each length; all hold.
        min_window: smallest window, tokens.
        sinks: sink sizes on offer.

    Returns:
        Distinct plans; empty where even the smallest window is too large.
    """
    plans: dict[str, Plan] = {}
    for sink in sinks:
        made = [_fixed(shape, limits, sink, min_window)]
        if len(limits) > 1:
            made.append(_elastic(shape, limits, sink, min_window))
        for plan in made:
            if plan is not None:
                plans.setdefault(plan.key(), plan)
    return list(plans.values())


def _fixed(shape: ModelShape, limits: Mapping[int, int], sink: int, min_window: int) -> Plan | None:
    alpha = _widest(min_window, max(limits), lambda a: _fits(shape, Rule(sink, a, 0), limits, min_window))
    return None if alpha is None else Plan.uniform(shape, Rule(sink, alpha, 0), min_window)


def _elastic(shape: ModelShape, limits: Mapping[int, int], sink: int, min_window: int) -> Plan | None:
    """The fastest growing window, then a fixed part of what is left."""
    beta_q = _widest(0, BETA_ONE, lambda b: _fits(shape, Rule(sink, 0, b), limits, min_window))
    if beta_q is None:
        return None
    alpha = _widest(0, max(limits), lambda a: _fits(shape, Rule(sink, a, beta_q), limits, min_window))
    return Plan.uniform(shape, Rule(sink, alpha or 0, beta_q), min_window)


def _fits(shape: ModelShape, rule: Rule, limits: Mapping[int, int], min_window: int) -> bool:
    plan = Plan.uniform(shape, rule, min_window)
    return all(plan.kv_bytes(n) <= limit for n, limit in limits.items())


def _widest(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """Returns the largest number in `[low, high]` that fits, by bisection; None where `low` does not."""
    if not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
