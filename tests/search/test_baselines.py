"""Baselines within the same bytes, against every plan of their kind there is."""

from __future__ import annotations

import itertools
import types
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moacompress.calibration.profile.statistics import Statistics
from moacompress.calibration.profile.store import Profile
from moacompress.core.errors import InfeasibleBudgetError, UsageError
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.windows import BETA_ONE
from moacompress.search.baselines.families import (
    BASELINES,
    FAMILIES,
    baseline_plans,
    family_plans,
    format_pairs,
    uniform_plan,
)
from moacompress.search.predict.surrogate import Surrogate
from tests.search.conftest import make_profile

DENSE = ModelShape("llama", 3, 4, 2, 16, "float32", (None,) * 3, "w")
SLIDING = ModelShape("gemma3_text", 3, 4, 2, 16, "bfloat16", (64, None, 64), "w")


@pytest.mark.parametrize(
    ("shape", "n", "sink", "share"),
    [
        (DENSE, 200, 4, 0.3),
        (DENSE, 1000, 64, 0.9),
        (DENSE, 1024, 16, 0.5),
        (SLIDING, 1000, 16, 0.3),
        (SLIDING, 200, 64, 0.5),
    ],
)
def test_uniform_is_the_widest_that_fits(shape: ModelShape, n: int, sink: int, share: float) -> None:
    limit = int(share * shape.dense_kv_bytes(n))
    try:
        plan = uniform_plan(shape, n, limit, sink, 32)
    except InfeasibleBudgetError:
        assert Plan.uniform(shape, Rule(sink, 32, 0), 32).kv_bytes(n) > limit
        return
    rule = plan.rules[0][0]
    assert {r for row in plan.rules for r in row} == {rule}
    assert (rule.sink, rule.beta_q) == (sink, 0)
    assert plan.kv_bytes(n) <= limit
    wider = [Plan.uniform(shape, Rule(sink, alpha, 0), 32) for alpha in range(rule.alpha + 1, n + 1)]
    assert all(other.kv_bytes(n) > limit for other in wider)


def test_too_small_a_budget_says_the_smallest() -> None:
    with pytest.raises(InfeasibleBudgetError, match="the smallest, 32 tokens, takes 36,864"):
        uniform_plan(DENSE, 1024, 10, 4, 32)


@pytest.fixture
def profile() -> Profile:
    """Of three layers, of which one slides over 64 tokens, with two KV heads each."""
    made = make_profile(layers=3)
    squares = made.statistics.arrays["squares"]
    moa = squares**0.5 * np.random.default_rng(3).uniform(0.5, 2, squares.shape).astype(np.float32)
    return replace(
        made,
        shape=replace(made.shape, native_windows=(None, 64, None)),
        statistics=Statistics({**made.statistics.arrays, "moa": moa}),
    )


def predicted(profile: Profile) -> np.ndarray:
    """[layers, kv_heads, rules], nats."""
    influence = profile.influence("robust")
    return Surrogate.build(influence, profile.rules, profile.min_window, max(profile.lengths)).costs()


def bytes_of(profile: Profile, rules: tuple[tuple[Rule, ...], ...], n: int) -> int:
    return Plan(profile.shape, profile.min_window, rules).kv_bytes(n)


def fits(profile: Profile, rules: tuple[tuple[Rule, ...], ...], limits: dict[int, int]) -> bool:
    return all(bytes_of(profile, rules, n) <= limit for n, limit in limits.items())


WINDOWED = [name for name in BASELINES if name != "quantized"]
"""Baselines that leave something out."""
BOTH = ("int8", "int4")
LIMITS = [{512: 0.3}, {500: 0.5}, {256: 0.4, 512: 0.4}, {256: 0.9, 512: 0.35}]


@pytest.mark.parametrize("shares", LIMITS)
def test_elastic_grows_as_fast_as_fits(profile: Profile, shares: dict[int, float]) -> None:
    limits = {n: int(share * profile.shape.dense_kv_bytes(n)) for n, share in shares.items()}
    for plan in baseline_plans("uniform-elastic", profile.shape, limits, 16):
        (rule,) = {rule for row in plan.rules for rule in row}
        assert rule.alpha == 0
        faster = [Rule(rule.sink, 0, beta_q) for beta_q in range(rule.beta_q + 1, BETA_ONE + 1)]
        assert not any(fits(replace(profile, min_window=16), ((r,) * 2,) * 3, limits) for r in faster)


@pytest.mark.parametrize("shares", LIMITS)
def test_per_layer_is_the_lowest_kl(profile: Profile, shares: dict[int, float]) -> None:
    limits = {n: int(share * profile.shape.dense_kv_bytes(n)) for n, share in shares.items()}
    few = {
        0,
        *(number for number, rule in enumerate(profile.rules) if rule.alpha in (32, 128) or rule.beta_q in (64, 256)),
    }
    numbers = sorted(few)
    statistics = Statistics({name: array[..., numbers] for name, array in profile.statistics.arrays.items()})
    profile = replace(profile, rules=tuple(profile.rules[number] for number in numbers), statistics=statistics)
    kl = predicted(profile)
    found = []
    for sink in (4, 16, 64):
        offered = [number for number, rule in enumerate(profile.rules) if rule.is_full or rule.sink == sink]
        choices = [
            (float(sum(kl[layer, :, number].sum() for layer, number in enumerate(choice))), choice)
            for choice in itertools.product(offered, repeat=3)
            if fits(profile, tuple((profile.rules[number],) * 2 for number in choice), limits)
        ]
        found.append(min(choices)[0])
    plans = baseline_plans("per-layer", profile.shape, limits, 32, profile)
    index = {rule: number for number, rule in enumerate(profile.rules)}
    assert all(len(set(row)) == 1 for plan in plans for row in plan.rules)
    kls = [sum(kl[i, :, index[row[0]]].sum() for i, row in enumerate(plan.rules)) for plan in plans]
    assert kls == pytest.approx(sorted(found), rel=1e-9)


@pytest.mark.parametrize(
    ("shares", "natives"), [*((one, (None, 64, None)) for one in LIMITS), (LIMITS[3], (None, None, None))]
)
def test_split_keeps_the_heads_that_need_it(
    profile: Profile, shares: dict[int, float], natives: tuple[int | None, ...]
) -> None:
    profile = replace(profile, shape=replace(profile.shape, native_windows=natives))
    limits = {n: int(share * profile.shape.dense_kv_bytes(n)) for n, share in shares.items()}
    plans = baseline_plans("split", profile.shape, limits, 32, profile)
    assert {rule.sink for plan in plans for row in plan.rules for rule in row if not rule.is_full} == {4, 16, 64}
    kl = predicted(profile)
    index = {rule: number for number, rule in enumerate(profile.rules)}
    left_over = []
    for plan in plans:
        (streaming,) = {rule for row in plan.rules for rule in row if not rule.is_full}
        assert streaming.beta_q == 0
        assert 32 <= streaming.alpha <= 256
        cost = kl[..., index[streaming]]
        heads = list(itertools.product(range(3), range(2)))
        full = {head for head in heads if plan.rules[head[0]][head[1]].is_full}
        left_over.append(sum(cost[head] for head in heads if head not in full))
        for other in set(heads) - full:  # nothing more fits, and what is left out would be harmed less
            more = [list(row) for row in plan.rules]
            more[other[0]][other[1]] = Rule.FULL
            assert not fits(profile, tuple(map(tuple, more)), limits)
            if not any(natives):
                assert all(cost[other] <= cost[head] for head in full)
    assert left_over == sorted(left_over)


def test_the_least_and_the_most_bytes(profile: Profile) -> None:
    limit = Plan.uniform(profile.shape, Rule(4, 32, 0), 32).kv_bytes(512)
    for name in WINDOWED:
        plans = baseline_plans(name, profile.shape, {512: limit}, 32, profile)
        assert {rule.sink for plan in plans for row in plan.rules for rule in row} == {4, 16}
        assert {plan.kv_bytes(512) for plan in plans} == {limit}
        with pytest.raises(InfeasibleBudgetError, match=f"no {name} plan fits .* a sink of 4 takes {limit:,}"):
            baseline_plans(name, profile.shape, {512: limit - 1}, 32, profile)
        whole = baseline_plans(name, profile.shape, {512: profile.shape.dense_kv_bytes(512)}, 32, profile)[0]
        assert whole.kept(512) == Plan.full(profile.shape).kept(512)


def test_a_family_of_uniform_windows_holds_at_every_length(profile: Profile) -> None:
    limits = {n: profile.shape.dense_kv_bytes(n) // 2 for n in profile.lengths}
    plans = family_plans("uniform", profile.shape, limits, profile, (4, 16, 64))
    assert len({plan.key() for plan in plans}) == len(plans) >= 5
    assert all(plan.kv_bytes(n) <= limit for plan in plans for n, limit in limits.items())
    elastic = [plan.rules[0][0] for plan in plans if plan.rules[0][0].beta_q]
    fixed = [plan.rules[0][0] for plan in plans if not plan.rules[0][0].beta_q]
    assert {rule.sink for rule in elastic} == {rule.sink for rule in fixed} == {4, 16, 64}
    by_sink = {rule.sink: rule for rule in elastic}
    longest = max(profile.lengths)
    assert all(by_sink[rule.sink].kept(longest, 32) > rule.kept(longest, 32) for rule in fixed)


def test_a_family_that_can_not_be_is_empty(profile: Profile) -> None:
    assert all(family_plans(name, profile.shape, {512: 10}, profile, (4, 16, 64)) == [] for name in FAMILIES)
    limits = {512: profile.shape.dense_kv_bytes(512) // 2}
    plain = replace(
        profile,
        statistics=Statistics({name: profile.statistics.arrays[name] for name in ("squares", "total")}),
    )
    assert [len(family_plans("moa", p.shape, limits, p, (4, 16))) for p in (plain, profile)] == [0, 2]
    with pytest.raises(UsageError, match="no statistics for the estimator 'moa'; profile with --baselines"):
        baseline_plans("moa", profile.shape, limits, 32, plain)


@pytest.mark.parametrize("shares", LIMITS)
def test_moa_is_the_least_of_its_own_estimator(profile: Profile, shares: dict[int, float]) -> None:
    limits = {n: int(share * profile.shape.dense_kv_bytes(n)) for n, share in shares.items()}
    plans = baseline_plans("moa", profile.shape, limits, 32, profile)
    assert len(plans) == 3
    surrogate = Surrogate.build(profile.influence("moa"), profile.rules, 32, max(profile.lengths))
    kls = [surrogate.predicted(plan) or 0.0 for plan in plans]
    assert kls == sorted(kls)
    rng = np.random.default_rng(0)
    for plan, kl in zip(plans, kls, strict=True):
        (sink,) = {rule.sink for row in plan.rules for rule in row if not rule.is_full}
        offered = [rule for rule in profile.rules if rule.is_full or rule.sink == sink]
        for _ in range(300):
            drawn = tuple(tuple(offered[i] for i in rng.integers(len(offered), size=2)) for _ in range(3))
            if fits(profile, drawn, limits):
                assert (surrogate.predicted(Plan(profile.shape, 32, drawn)) or 0.0) >= kl * (1 - 5e-3)


def formats_of(plan: Plan) -> set[tuple[str, str]]:
    return {(rule.key_format, rule.value_format) for row in plan.rules for rule in row}


def test_pairs_round_keys_no_more_than_values() -> None:
    native, eight, four = "native", "int8", "int4"
    assert format_pairs(()) == format_pairs((native,)) == ((native, native),)
    assert format_pairs((four,)) == ((native, native), (four, four))
    assert format_pairs((four, eight)) == ((native, native), (eight, eight), (eight, four), (four, four))


@pytest.mark.parametrize("shape", [replace(DENSE, head_dim=64), replace(SLIDING, head_dim=64)])
def test_everything_in_the_formats_that_fit(shape: ModelShape) -> None:
    full = [Plan.uniform(shape, replace(Rule.FULL, key_format=k, value_format=v)) for k, v in format_pairs(BOTH)[1:]]
    sizes = [plan.kv_bytes(512) for plan in full]
    assert sizes == sorted(sizes, reverse=True)
    for count, size in enumerate(reversed(sizes), 1):
        found = baseline_plans("quantized", shape, {512: size}, 32, formats=BOTH)
        assert [plan.key() for plan in found] == [plan.key() for plan in full[-count:]]
    with pytest.raises(InfeasibleBudgetError, match=f"everything in the shortest codes takes {sizes[-1]:,}"):
        baseline_plans("quantized", shape, {512: sizes[-1] - 1}, 32, formats=BOTH)
    with pytest.raises(InfeasibleBudgetError, match="no format but native is on offer"):
        baseline_plans("quantized", shape, {512: 10**9}, 32)


@pytest.mark.parametrize(
    ("name", "shares"), [*zip(["uniform", "uniform-elastic", "per-layer", "split"], LIMITS, strict=True)]
)
def test_a_baseline_in_every_pair_of_formats(profile: Profile, name: str, shares: dict[int, float]) -> None:
    profile = replace(profile, shape=replace(profile.shape, head_dim=64))
    limits = {n: int(share * profile.shape.dense_kv_bytes(n)) for n, share in shares.items()}
    plans = baseline_plans(name, profile.shape, limits, 32, profile, formats=BOTH)
    assert all(plan.kv_bytes(n) <= limit for plan in plans for n, limit in limits.items())
    of_pairs = {pair: [plan for plan in plans if formats_of(plan) == {pair}] for pair in format_pairs(BOTH)}
    assert sum(map(len, of_pairs.values())) == len(plans)
    native = baseline_plans(name, profile.shape, limits, 32, profile)
    assert of_pairs["native", "native"] == native
    assert [formats_of(plan) for plan in plans[:4]] == [{pair} for pair in of_pairs]
    kept = [max(plan.kept(512) for plan in of_pair) for of_pair in of_pairs.values()]
    assert kept == sorted(kept)
    assert kept[-1] > kept[0]


def test_what_stays_native(profile: Profile) -> None:
    limits = {512: profile.shape.dense_kv_bytes(512) // 2}
    plans = baseline_plans("moa", profile.shape, limits, 32, profile, formats=BOTH)
    assert plans == baseline_plans("moa", profile.shape, limits, 32, profile)
    assert family_plans("quantized", profile.shape, limits, profile, (4,)) == []
    shape = replace(profile.shape, head_dim=64)
    limits = {512: shape.dense_kv_bytes(512) // 2}
    assert len(family_plans("quantized", shape, limits, profile, (4, 16), BOTH)) == 3


def test_one_choice_for_all_takes_what_it_may() -> None:
    shape = ModelShape("llama", 2, 4, 2, 16, "bfloat16", (None, 128), "w")
    draw = np.random.default_rng(0)
    weights = GateWeights(draw.standard_normal((2, 2, 8), np.float32), draw.standard_normal((2, 2), np.float32))
    rules = (Rule.FULL, Rule(4, 16, 0), Rule(4, 16, 0, select_alpha=16), Rule(4, 32, 0, select_alpha=16))

    def plan(rows: list[list[Rule]]) -> Plan:
        return Plan(shape, 16, tuple(map(tuple, rows)), gates=weights.fingerprint, gate_weights=weights)

    profile: Any = types.SimpleNamespace(shape=shape, min_window=16, rules=rules, plan=plan)
    limits = {1024: shape.dense_kv_bytes(1024) // 4, 512: shape.dense_kv_bytes(512) // 4}
    found = family_plans("uniform_gates", shape, limits, profile, (4,), BOTH)
    assert found
    for each in found:
        assert all(each.kv_bytes(n) <= limit for n, limit in limits.items())
        first, second = each.rules[0][0], each.rules[1][0]
        assert first.selects
        assert not second.selects  # a window of the layer's own
        assert {*each.rules[0]} == {first}
        if first.select_beta_q < 1024:
            more = replace(first, select_beta_q=first.select_beta_q + 1)
            wider = plan([[more] * 2, [more.without_choice()] * 2])
            assert any(wider.kv_bytes(n) > limit for n, limit in limits.items())
    assert family_plans("uniform_gates", shape, {512: 10}, profile, (4,), BOTH) == []
    profile.rules = rules[:2]
    assert family_plans("uniform_gates", shape, limits, profile, (4,), BOTH) == []
