"""Plans that need no search, at the same bytes: what a found plan has to beat.

Every baseline is a list of candidates, at least one for each sink, of which the best measured counts: a plan must beat
the alternative at its best. Where a search offers formats of keys and values, so does every baseline, a pair for all KV heads.
Bytes are those of cache slots, native windows respected, as everywhere.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from moacompress.core.arrays import Floats, Ints
from moacompress.core.errors import InfeasibleBudgetError, UsageError
from moacompress.rules.budget import format_length
from moacompress.rules.cost import byte_table, limit_array
from moacompress.rules.formats import NATIVE, at_least_as_exact
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan, may_be_same_weights
from moacompress.rules.rule import SINKS, Rule
from moacompress.rules.windows import BETA_ONE
from moacompress.search.knapsack import Knapsack, total_cost
from moacompress.search.solver import solve
from moacompress.search.surrogate import Surrogate

if TYPE_CHECKING:
    from moacompress.calibration.store import Profile

STREAMING_WINDOW = 256
"""Widest fixed window of a streaming KV head, tokens."""
Pair: TypeAlias = tuple[str, str]
"""A format of keys and one of values."""
NATIVE_PAIR: Pair = (NATIVE, NATIVE)


def baseline_plans(
    name: str, shape: ModelShape, n: int, kv_bytes: int, min_window: int, profile: Profile | None = None
) -> list[Plan]:
    """Returns the candidates of a baseline that take at most `kv_bytes` at `n` tokens; see `plans_within`."""
    return plans_within(name, shape, {n: kv_bytes}, min_window, profile)


def plans_within(
    name: str,
    shape: ModelShape,
    limits: Mapping[int, int],
    min_window: int = 32,
    profile: Profile | None = None,
    sinks: Sequence[int] = SINKS,
    pair: Pair = NATIVE_PAIR,
) -> list[Plan]:
    """Returns the candidates of a baseline within byte limits, as near below them as the baseline allows.

    Args:
        name: one of `BASELINES`, or `quantized`:
            `uniform`: one sink and fixed window for every KV head (StreamingLLM);
            `uniform-elastic`: one sink and share of the tokens so far for every KV head;
            `per-layer`: one rule of the profile for all KV heads of a layer, least predicted harm;
            `split`: KV heads keep everything or a sink and a short window (DuoAttention), those that the short window
            would harm most keep everything, as many as fit;
            `moa`: the choice of rules of least influence by MoA's own estimator, one sink for all KV heads; the profile
            must have been made with `--baselines`;
            `quantized`: every KV head keeps everything, in a pair of formats that is not native.
        shape: the model; native windows are respected.
        limits: most KV bytes at each length, tokens; all hold.
        min_window: smallest window, tokens.
        profile: what all but the first two are predicted from.
        sinks: sink sizes on offer; of the first two a candidate each, of the others those that the profile knows.
        pair: formats of all KV heads; `moa` says nothing of any but the native ones.

    Returns:
        At least one plan, all different; of those made from a profile the one of least predicted harm first.

    Raises:
        UsageError: unknown name, or no profile of this model where one is needed.
        InfeasibleBudgetError: no candidate fits.
    """
    if name not in _UNPROFILED and name not in _PROFILED:
        near = difflib.get_close_matches(name, BASELINES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(BASELINES)}"
        raise UsageError(f"unknown baseline {name!r}; {hint}")
    if name in _UNPROFILED:
        made = [_UNPROFILED[name](shape, limits, sink, min_window, pair) for sink in sinks]
        found = [plan for plan in made if plan is not None]
    else:
        costs = _Costs.of(name, shape, min_window, profile, pair)
        ranked = [pair for sink in sinks for pair in _PROFILED[name](costs, limits, sink)]
        found = [plan for _, plan in sorted(ranked, key=lambda pair: pair[0])]
    if not found:
        n, limit = next(iter(limits.items()))
        raise InfeasibleBudgetError(
            f"no {name} plan fits {limit:,} KV bytes at {format_length(n)} tokens"
            + (f" and {len(limits) - 1} more limits" if len(limits) > 1 else "")
            + f": a window of {min_window} tokens with a sink of {min(sinks)} takes "
            f"{_kv_bytes(shape, Rule(min(sinks), min_window, 0), min_window, n):,}"
        )
    return list({plan.key(): plan for plan in reversed(found)}.values())[::-1]


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
    plan = _fixed(shape, {n: kv_bytes}, sink, min_window, NATIVE_PAIR)
    if plan is None:
        smallest = _kv_bytes(shape, Rule(sink, min_window, 0), min_window, n)
        raise InfeasibleBudgetError(
            f"no uniform window with a sink of {sink} fits {kv_bytes:,} KV bytes at {format_length(n)} tokens: the "
            f"smallest, {min_window} tokens, takes {smallest:,}"
        )
    return plan


def _fixed(shape: ModelShape, limits: Mapping[int, int], sink: int, min_window: int, pair: Pair) -> Plan | None:
    alpha = _widest(min_window, max(limits), lambda a: _fits(shape, Rule(sink, a, 0, *pair), limits, min_window))
    return None if alpha is None else Plan.uniform(shape, Rule(sink, alpha, 0, *pair), min_window)


def _elastic(shape: ModelShape, limits: Mapping[int, int], sink: int, min_window: int, pair: Pair) -> Plan | None:
    beta_q = _widest(0, BETA_ONE, lambda b: _fits(shape, Rule(sink, 0, b, *pair), limits, min_window))
    return None if beta_q is None else Plan.uniform(shape, Rule(sink, 0, beta_q, *pair), min_window)


def _quantized(shape: ModelShape, limits: Mapping[int, int], sink: int, min_window: int, pair: Pair) -> Plan | None:
    rule = Rule(Rule.FULL.sink, Rule.FULL.alpha, Rule.FULL.beta_q, *pair)
    return (
        None if rule.is_native or not _fits(shape, rule, limits, min_window) else Plan.uniform(shape, rule, min_window)
    )


class _Costs:
    """Predicted harm and bytes of a profile's rules, and plans made of them.

    Attributes:
        rules: those of the profile in one pair of formats.
        harm: nats, mean over the profile's lengths, monotone, [layers, kv_heads, rules].
    """

    def __init__(self, shape: ModelShape, min_window: int, rules: tuple[Rule, ...], harm: Floats) -> None:
        self.shape, self.min_window, self.rules, self.harm = shape, min_window, rules, harm

    @staticmethod
    def of(name: str, shape: ModelShape, min_window: int, profile: Profile | None, pair: Pair) -> _Costs:
        if profile is None:
            raise UsageError(
                f"the baseline {name} is made from a profile and there is none; give the folder of a finished profile, or "
                f"leave {name} out"
            )
        if not may_be_same_weights(profile.shape.weights_fingerprint, shape.weights_fingerprint):
            raise UsageError(
                f"the baseline {name} needs a profile of this model (weights {shape.weights_fingerprint}); that in "
                f"{profile.path} is of weights {profile.shape.weights_fingerprint}"
            )
        estimator = "moa" if name == "moa" else profile.recipe.profile.estimator
        offered = profile.offering([name for name in dict.fromkeys(pair) if name != NATIVE])
        surrogate = _surrogate(offered, estimator)
        numbers = [at for at, rule in enumerate(offered.rules) if (rule.key_format, rule.value_format) == pair]
        rules = tuple(offered.rules[number] for number in numbers)
        return _Costs(shape, min_window, rules, surrogate.costs()[..., numbers])

    def sizes(self, numbers: Sequence[int], limits: Mapping[int, int]) -> np.ndarray:
        """Returns the bytes of the numbered rules, int64 [lengths, layers, kv_heads, rules]."""
        return byte_table(self.shape, [self.rules[number] for number in numbers], self.min_window, list(limits))

    def plan(self, choice: np.ndarray) -> tuple[float, Plan]:
        """Returns the predicted harm and the plan of a choice of rules, [layers, kv_heads]."""
        harm = total_cost(self.harm, choice)
        rules = tuple(tuple(self.rules[number] for number in row) for row in choice.tolist())
        return harm, Plan(self.shape, self.min_window, rules)


def _surrogate(profile: Profile, estimator: str) -> Surrogate:
    influence = profile.blended(estimator, profile.recipe.search.text_weight)
    return Surrogate.build(influence, profile.rules, profile.min_window, max(profile.lengths))


def _per_layer(costs: _Costs, limits: Mapping[int, int], sink: int) -> Iterable[tuple[float, Plan]]:
    """The choice of one rule for each layer of least predicted harm."""
    numbers = [number for number, rule in enumerate(costs.rules) if rule.sees_all or rule.sink == sink]
    sizes = costs.sizes(numbers, limits).sum(axis=2)
    try:
        solution = solve(costs.harm[..., numbers].sum(axis=1), sizes, limit_array(limits))
    except InfeasibleBudgetError:
        return
    layers = np.array(numbers)[solution.choice]
    yield costs.plan(np.repeat(layers[:, None], costs.shape.kv_heads, axis=1))


def _split(costs: _Costs, limits: Mapping[int, int], sink: int) -> Iterable[tuple[float, Plan]]:
    """For each streaming window: everything for the KV heads that it would harm most, as many as fit."""
    full = next(number for number, rule in enumerate(costs.rules) if rule.sees_all)
    for number, rule in enumerate(costs.rules):
        if rule.sink != sink or rule.beta_q or rule.alpha > STREAMING_WINDOW:
            continue
        streaming, everything = np.moveaxis(costs.sizes([number, full], limits), -1, 0)
        left = limit_array(limits) - streaming.sum(axis=(1, 2))
        if (left < 0).any():
            continue
        choice = np.full(costs.harm.shape[:2], number)
        # where all full heads take the same bytes these are the first ones; a native window may fit in where no other does
        for head in np.argsort(-costs.harm[..., number], axis=None, kind="stable"):
            layer_head = np.unravel_index(head, choice.shape)
            added = (everything - streaming)[(slice(None), *layer_head)]
            if (added <= left).all():
                left = left - added
                choice[layer_head] = full
        yield costs.plan(choice)


def _moa(costs: _Costs, limits: Mapping[int, int], sink: int) -> Iterable[tuple[float, Plan]]:
    """The choice of a rule for each KV head of least predicted harm."""
    numbers = [number for number, rule in enumerate(costs.rules) if rule.is_full or rule.sink == sink]
    knapsack = Knapsack(costs.sizes(numbers, limits), limit_array(limits), "lagrange")
    try:
        choice = knapsack.choose(costs.harm[..., numbers])
    except InfeasibleBudgetError:
        return
    yield costs.plan(np.array(numbers)[choice])


_UNPROFILED: dict[str, Callable[[ModelShape, Mapping[int, int], int, int, Pair], Plan | None]] = {
    "uniform": _fixed,
    "uniform-elastic": _elastic,
    "quantized": _quantized,
}
_PROFILED: dict[str, Callable[[_Costs, Mapping[int, int], int], Iterable[tuple[float, Plan]]]] = {
    "per-layer": _per_layer,
    "split": _split,
    "moa": _moa,
}
BASELINES = ("uniform", "uniform-elastic", *_PROFILED)
"""Names of the baselines that need no formats; those after the first two need a profile."""
FAMILIES = {
    "uniform": ("uniform", "uniform-elastic"),
    "per_layer": ("per-layer",),
    "duo": ("split",),
    "moa": ("moa",),
    "quantized": ("quantized",),
}
"""What a search measures beside its plans, and the baselines whose best candidate stands for it."""


def family_plans(
    family: str, shape: ModelShape, limits: Mapping[int, int], profile: Profile, sinks: Sequence[int]
) -> list[Plan]:
    """Returns the candidates of one of `FAMILIES`; empty where none fits, or the profile lacks what they are made from.

    Where the profile offers formats there are candidates in every pair of them whose keys are at least as exact as its values,
    those predicted to be best first. Other arguments are those of `plans_within`.
    """
    found: dict[str, Plan] = {}
    for pair in _pairs(profile.formats):
        for name in FAMILIES[family]:
            if name == "moa" and (pair != NATIVE_PAIR or name not in profile.offering(()).estimators):
                continue
            if name == "uniform-elastic" and len(limits) == 1:
                continue  # at one length it is a fixed window
            with suppress(InfeasibleBudgetError):
                plans = plans_within(name, shape, limits, profile.min_window, profile, sinks, pair)
                found |= {plan.key(): plan for plan in plans}
    if not profile.formats:
        return list(found.values())
    surrogate = _surrogate(profile, profile.recipe.profile.estimator)
    return sorted(found.values(), key=lambda plan: _guessed(surrogate, plan, max(limits)))


def _pairs(formats: Sequence[str]) -> list[Pair]:
    """Returns the pairs of formats that baselines are tried in, the native one first."""
    offered = (NATIVE, *formats)
    return [(keys, values) for keys in offered for values in offered if at_least_as_exact(keys, values)]


def _guessed(surrogate: Surrogate, plan: Plan, n: int) -> float:
    """Returns about what a plan is predicted to cost: each rule as the widest candidate that keeps no more tokens at `n`."""
    kept = np.array([rule.kept(n, plan.min_window) for rule in surrogate.rules], np.float64)
    pairs = np.array([(rule.key_format, rule.value_format) for rule in surrogate.rules])
    nearest: dict[Rule, int] = {}
    for rule in {rule for row in plan.rules for rule in row}:
        alike = (pairs == (rule.key_format, rule.value_format)).all(axis=1)
        near = np.where(kept <= rule.kept(n, plan.min_window), kept, -kept)
        nearest[rule] = int(np.argmax(np.where(alike, near, -np.inf)))
    choice: Ints = np.array([[nearest[rule] for rule in row] for row in plan.rules], np.int64)
    return total_cost(surrogate.costs(), choice)


def _fits(shape: ModelShape, rule: Rule, limits: Mapping[int, int], min_window: int) -> bool:
    return all(_kv_bytes(shape, rule, min_window, n) <= limit for n, limit in limits.items())


def _kv_bytes(shape: ModelShape, rule: Rule, min_window: int, n: int) -> int:
    """Returns the bytes at `n` tokens if every KV head has the rule."""
    slots = sum(rule.slots(n, min_window, native) for native in shape.native_windows)
    return int(slots * shape.kv_heads * shape.token_bytes(rule))


def _widest(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """Returns the largest number in `[low, high]` that fits, by bisection; None where `low` does not."""
    if not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
