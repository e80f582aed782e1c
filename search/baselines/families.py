"""Plans that need no search, at the same bytes: what a found plan has to beat.

Every baseline is a list of candidates, for each sink and pair of formats, of which the best measured counts: a plan must beat
the baseline at its best. Bytes are those of cache slots, native windows respected, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from moacompress.calibration.profile.statistics import ROBUST
from moacompress.core.arrays import Floats
from moacompress.core.errors import InfeasibleBudgetError, UsageError, did_you_mean
from moacompress.rules.budget import bytes_at
from moacompress.rules.formats import NATIVE, find_format
from moacompress.rules.key_centres import Centres
from moacompress.rules.kv_bytes import candidate_kv_bytes
from moacompress.rules.limits import Limits, is_within, limit_array
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import SINKS, Rule
from moacompress.rules.windows import BETA_ONE
from moacompress.search.predict.surrogate import Surrogate
from moacompress.search.problem.knapsack import Knapsack, total_cost
from moacompress.search.problem.solver import solve

if TYPE_CHECKING:
    from moacompress.calibration.profile.store import Profile

FormatPair: TypeAlias = tuple[str, str]
"""Formats of the keys and of the values, by name."""
NATIVE_PAIR: FormatPair = (NATIVE, NATIVE)
MOA = "moa"
UNIFORM_GATES = "uniform_gates"
"""Name of the family of `uniform_choices`."""
STREAMING_WINDOW = 256
"""Widest fixed window of a streaming KV head, tokens."""


def format_pairs(formats: Sequence[str]) -> tuple[FormatPair, ...]:
    """Returns the pairs of formats that baselines are offered: native, and others that round values no less than keys."""
    coded = sorted({*formats} - {NATIVE}, key=lambda name: find_format(name).code)  # of ours, the most exact first
    return (NATIVE_PAIR, *((keys, values) for number, keys in enumerate(coded) for values in coded[number:]))


def baseline_plans(
    name: str,
    shape: ModelShape,
    limits: Limits,
    min_window: int = 32,
    profile: Profile | None = None,
    sinks: Sequence[int] = SINKS,
    formats: Sequence[str] = (),
    centres: Centres = (),
) -> list[Plan]:
    """Returns the candidates of a baseline within limits, as near below them as the baseline allows.

    Args:
        name: one of `BASELINES`:
            `uniform`: one sink and fixed window for every KV head (StreamingLLM);
            `uniform-elastic`: one sink and share of the tokens so far for every KV head;
            `quantized`: everything, rounded, in one pair of formats for every KV head (what a quantized cache gives);
            `per-layer`: one span of the profile for all KV heads of a layer, lowest predicted KL, in one pair of formats;
            `split`: KV heads keep everything or a sink and a short window (DuoAttention), in one pair of formats; those
            that the short window would degrade most keep everything, as many as fit;
            `moa`: the choice of rules of least influence by MoA's own estimator, one sink for all KV heads; the profile
            must have been made with `--baselines`.
        shape: the model; native windows are respected.
        limits: all hold.
        min_window: smallest window, tokens.
        profile: what all but the first three are predicted from.
        sinks: sink sizes on offer; of the first two a candidate each, of the others those that the profile knows.
        formats: formats on offer beside the native one, see `format_pairs`; `moa` is native.
        centres: what keys in codes lie less, as of any plan of the model.

    Returns:
        At least one plan, all different; pairs of formats take turns, and of each the plan of lowest predicted KL comes first
        where they are made from a profile, which is taken to know nothing of formats.

    Raises:
        UsageError: unknown name, or no profile of this model where one is needed.
        InfeasibleBudgetError: no candidate fits.
    """
    if name not in _UNPROFILED and name not in _PROFILED:
        hint = did_you_mean(name, BASELINES, f"known are {', '.join(BASELINES)}")
        raise UsageError(f"unknown baseline {name!r}; {hint}")
    pairs = format_pairs(formats) if name in _IN_FORMATS else (NATIVE_PAIR,)
    if name in _UNPROFILED:
        make = _UNPROFILED[name]
        made = [[make(shape, limits, sink, min_window, pair) for sink in sinks] for pair in pairs]
        of_pairs = [[plan for plan in plans if plan is not None] for plans in made]
    else:
        costs = _Costs.of(name, shape, min_window, profile)
        of_pairs = [_ranked(name, costs.in_formats(pair), limits, sinks) for pair in pairs]
    turns = zip_longest(*map(_different, of_pairs))
    found = [plan for turn in turns for plan in turn if plan is not None]
    if not found:
        raise InfeasibleBudgetError(_too_little(name, shape, limits, min_window, sinks, pairs))
    return [replace(plan, centres=centres) for plan in found] if centres else found


def _different(plans: Sequence[Plan]) -> list[Plan]:
    return list({plan.key(): plan for plan in reversed(plans)}.values())[::-1]


def _ranked(name: str, costs: _Costs, limits: Limits, sinks: Sequence[int]) -> list[Plan]:
    """Returns the candidates of a baseline in one pair of formats, the one of lowest predicted KL first."""
    ranked = [pair for sink in sinks for pair in _PROFILED[name](costs, limits, sink)]
    return [plan for _, plan in sorted(ranked, key=lambda pair: pair[0])]


def _too_little(
    name: str,
    shape: ModelShape,
    limits: Limits,
    min_window: int,
    sinks: Sequence[int],
    pairs: Sequence[FormatPair],
) -> str:
    """Returns what to say where no candidate fits: what there is, and what the smallest one takes."""
    n, limit = next(iter(limits.items()))
    more = f" and {len(limits) - 1} more limits" if len(limits) > 1 else ""
    text = f"no {name} plan fits {bytes_at(limit, n)}{more}"
    if name == "quantized":
        rules, what = (
            [Rule.FULL.in_formats(*pair) for pair in pairs if pair != NATIVE_PAIR],
            "everything in the shortest codes",
        )
        if not rules:
            return f"{text}: no format but native is on offer"
    else:
        rules = [Rule(min(sinks), min_window, 0).in_formats(*pair) for pair in pairs]
        what = f"a window of {min_window} tokens with a sink of {min(sinks)}"
    smallest = min(Plan.uniform(shape, rule, min_window).kv_bytes(n) for rule in rules)
    return f"{text}: {what} takes {smallest:,} KV bytes"


def uniform_plan(shape: ModelShape, n: int, kv_bytes: int, sink: int, min_window: int = 32) -> Plan:
    """Returns the plan that gives every KV head the same sink and fixed window, the widest that fits `kv_bytes` at `n` tokens.

    Raises:
        InfeasibleBudgetError: not even the smallest window fits.
    """
    plan = _fixed(shape, {n: kv_bytes}, sink, min_window, NATIVE_PAIR)
    if plan is None:
        smallest = Plan.uniform(shape, Rule(sink, min_window, 0), min_window).kv_bytes(n)
        raise InfeasibleBudgetError(
            f"no uniform window with a sink of {sink} fits {bytes_at(kv_bytes, n)}: the smallest, {min_window} tokens, takes "
            f"{smallest:,}"
        )
    return plan


def _fixed(shape: ModelShape, limits: Limits, sink: int, min_window: int, pair: FormatPair) -> Plan | None:
    def made(alpha: int) -> Plan:
        return Plan.uniform(shape, Rule(sink, alpha, 0, *pair), min_window)

    alpha = _widest(min_window, max(limits), lambda a: is_within(made(a), limits))
    return None if alpha is None else made(alpha)


def _elastic(shape: ModelShape, limits: Limits, sink: int, min_window: int, pair: FormatPair) -> Plan | None:
    def made(beta_q: int) -> Plan:
        return Plan.uniform(shape, Rule(sink, 0, beta_q, *pair), min_window)

    beta_q = _widest(0, BETA_ONE, lambda b: is_within(made(b), limits))
    return None if beta_q is None else made(beta_q)


def _quantized(shape: ModelShape, limits: Limits, sink: int, min_window: int, pair: FormatPair) -> Plan | None:
    """Everything in a pair of formats, whatever the sink; no candidate where that is the dense model."""
    plan = Plan.uniform(shape, Rule.FULL.in_formats(*pair), min_window)
    return plan if pair != NATIVE_PAIR and is_within(plan, limits) else None


class _Costs:
    """Predicted KL and bytes of a profile's rules, and plans made of them.

    Attributes:
        rules: those of the profile, in one pair of formats.
        kl: of their spans, nats, mean over the profile's lengths, monotone, [layers, kv_heads, rules].
    """

    def __init__(self, shape: ModelShape, min_window: int, rules: tuple[Rule, ...], kl: Floats) -> None:
        self.shape, self.min_window, self.rules, self.kl = shape, min_window, rules, kl

    def in_formats(self, pair: FormatPair) -> _Costs:
        """Returns the same spans in a pair of formats."""
        return _Costs(self.shape, self.min_window, tuple(rule.in_formats(*pair) for rule in self.rules), self.kl)

    @staticmethod
    def of(name: str, shape: ModelShape, min_window: int, profile: Profile | None) -> _Costs:
        if profile is None:
            raise UsageError(
                f"the baseline {name} is made from a profile and there is none; give the folder of a finished profile, or "
                f"leave {name} out"
            )
        if profile.shape.weights_fingerprint != shape.weights_fingerprint:
            raise UsageError(
                f"the baseline {name} needs a profile of this model (weights {shape.weights_fingerprint}); that in "
                f"{profile.path} is of weights {profile.shape.weights_fingerprint}"
            )
        profile = profile.without_gates()
        influence = profile.blended(MOA if name == MOA else ROBUST)
        surrogate = Surrogate.build(influence, profile.rules, profile.min_window, max(profile.lengths))
        return _Costs(shape, min_window, profile.rules, surrogate.costs())

    def sizes(self, numbers: Sequence[int], limits: Limits) -> np.ndarray:
        """Returns the bytes that the numbered rules take at the limited lengths, int64 [lengths, layers, kv_heads, rules]."""
        return candidate_kv_bytes(self.shape, [self.rules[number] for number in numbers], self.min_window, list(limits))

    def plan(self, choice: np.ndarray) -> tuple[float, Plan]:
        """Returns the predicted KL and the plan of a choice of rules, [layers, kv_heads]."""
        kl = total_cost(self.kl, choice)
        rules = tuple(tuple(self.rules[number] for number in row) for row in choice.tolist())
        return kl, Plan(self.shape, self.min_window, rules)


def _per_layer(costs: _Costs, limits: Limits, sink: int) -> Iterable[tuple[float, Plan]]:
    """The choice of one rule for each layer of lowest predicted KL."""
    numbers = [number for number, rule in enumerate(costs.rules) if rule.sees_all or rule.sink == sink]
    sizes = costs.sizes(numbers, limits).sum(axis=2)
    try:
        solution = solve(costs.kl[..., numbers].sum(axis=1), sizes, limit_array(limits))
    except InfeasibleBudgetError:
        return
    layers = np.array(numbers)[solution.choice]
    yield costs.plan(np.repeat(layers[:, None], costs.shape.kv_heads, axis=1))


def _split(costs: _Costs, limits: Limits, sink: int) -> Iterable[tuple[float, Plan]]:
    """For each streaming window: everything for the KV heads that it would degrade most, as many as fit."""
    full = next(number for number, rule in enumerate(costs.rules) if rule.sees_all)
    for number, rule in enumerate(costs.rules):
        if rule.sink != sink or rule.beta_q or rule.alpha > STREAMING_WINDOW:
            continue
        streaming, everything = np.moveaxis(costs.sizes([number, full], limits), -1, 0)
        left = limit_array(limits) - streaming.sum(axis=(1, 2))
        if (left < 0).any():
            continue
        choice = np.full(costs.kl.shape[:2], number)
        # where all full heads take the same bytes these are the first ones; a native window may fit in where no other does
        for head in np.argsort(-costs.kl[..., number], axis=None, kind="stable"):
            layer_head = np.unravel_index(head, choice.shape)
            added = (everything - streaming)[(slice(None), *layer_head)]
            if (added <= left).all():
                left = left - added
                choice[layer_head] = full
        yield costs.plan(choice)


def _moa(costs: _Costs, limits: Limits, sink: int) -> Iterable[tuple[float, Plan]]:
    """The choice of a rule for each KV head of lowest predicted KL."""
    numbers = [number for number, rule in enumerate(costs.rules) if rule.is_full or rule.sink == sink]
    knapsack = Knapsack(costs.sizes(numbers, limits), limit_array(limits))
    try:
        choice = knapsack.choose(costs.kl[..., numbers])
    except InfeasibleBudgetError:
        return
    yield costs.plan(np.array(numbers)[choice])


_UNPROFILED: dict[str, Callable[[ModelShape, Limits, int, int, FormatPair], Plan | None]] = {
    "uniform": _fixed,
    "uniform-elastic": _elastic,
    "quantized": _quantized,
}
_PROFILED: dict[str, Callable[[_Costs, Limits, int], Iterable[tuple[float, Plan]]]] = {
    "per-layer": _per_layer,
    "split": _split,
    MOA: _moa,
}
BASELINES = (*_UNPROFILED, *_PROFILED)
"""Names of the baselines; those after the first three need a profile."""
_IN_FORMATS = (*_UNPROFILED, "per-layer", "split")
"""Baselines that are offered formats beside the native one."""
FAMILIES = {
    "uniform": ("uniform", "uniform-elastic"),
    "per_layer": ("per-layer",),
    "duo": ("split",),
    MOA: (MOA,),
    "quantized": ("quantized",),
    UNIFORM_GATES: (),
}
"""What a search measures beside its plans, and the baselines whose best candidate stands for it."""


def uniform_choices(profile: Profile, limits: Limits, formats: Sequence[str] = ()) -> list[Plan]:
    """Returns plans of one rule for every KV head, by which its gate keeps as large a share of the tokens as fits.

    There is none in a profile without gates.
    """
    sink, found = min((rule.sink for rule in profile.rules if rule.selects), default=None), []
    if sink is None:
        return []

    def made(window: int, beta_q: int, pair: FormatPair) -> Plan:
        rule = Rule(sink, window, 0, *pair, select_beta_q=beta_q)
        rules = [rule if native is None else rule.without_choice() for native in profile.shape.native_windows]
        return profile.plan([[rule] * profile.shape.kv_heads for rule in rules])

    for pair in format_pairs(formats):
        for window in (profile.min_window, 4 * profile.min_window):

            def fits(beta_q: int, window: int = window, pair: FormatPair = pair) -> bool:
                return is_within(made(window, beta_q, pair), limits)

            widest = _widest(1, BETA_ONE, fits)
            if widest is not None:
                found.append(made(window, widest, pair))
    return found


def family_plans(
    family: str,
    shape: ModelShape,
    limits: Limits,
    profile: Profile,
    sinks: Sequence[int],
    formats: Sequence[str] = (),
) -> list[Plan]:
    """Returns the candidates of one of `FAMILIES`; empty where none fits, or the profile lacks what they are made from.

    The sinks and formats, beside the native one, are those on offer.
    """
    if family == UNIFORM_GATES:
        return uniform_choices(profile, limits, formats)
    found: dict[str, Plan] = {}
    for name in FAMILIES[family]:
        if name == MOA and name not in profile.estimators:
            continue
        if name == "uniform-elastic" and len(limits) == 1:
            continue  # at one length it is a fixed window
        with suppress(InfeasibleBudgetError):
            plans = baseline_plans(name, shape, limits, profile.min_window, profile, sinks, formats, profile.centres)
            found |= {plan.key(): plan for plan in plans}
    return list(found.values())


def _widest(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """Returns the largest number in `[low, high]` that fits, by bisection; None where `low` does not."""
    if not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
