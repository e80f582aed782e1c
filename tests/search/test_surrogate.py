from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from moacompress.calibration.profile.store import Profile
from moacompress.core.errors import ArtefactError
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.windows import visible_intervals
from moacompress.search.predict.surrogate import (
    GAMMA_RANGE,
    Calibration,
    Surrogate,
    fit,
    monotone,
    nested,
    pick_ablations,
)

Profiles = Callable[..., Profile]


def build(profile: Profile) -> Surrogate:
    return Surrogate.build(profile.influence("robust"), profile.rules, profile.min_window, max(profile.lengths))


def test_nested_means_that_every_visible_key_stays_visible(profiles: Profiles) -> None:
    rules = profiles().rules
    supersets = nested(rules, 32, 512)
    assert supersets.diagonal().all()
    assert supersets[:, 0].all()
    for a, small in enumerate(rules):
        for b, large in enumerate(rules):
            inside = True
            for n in range(1, 513, 7):
                (_, sink_a), (start_a, _) = visible_intervals(n, small.span(32))
                (_, sink_b), (start_b, _) = visible_intervals(n, large.span(32))
                inside &= start_b <= start_a and (sink_a <= sink_b or sink_a >= start_b)
            if supersets[a, b]:
                assert inside
                assert small.kept(512, 32) <= large.kept(512, 32)


def test_a_superset_keeps_as_exactly(profiles: Profiles) -> None:
    profile = profiles(formats=True).offering(("int8", "int4"))
    rules, spans = profile.rules, len(profile.spans)
    supersets, alone = nested(rules, 32, 512), nested(profile.spans, 32, 512)
    order = ("native", "int8", "int4")
    for a, small in enumerate(rules):
        for b, large in enumerate(rules):
            exact = order.index(large.key_format) <= order.index(small.key_format)
            exact &= order.index(large.value_format) <= order.index(small.value_format)
            assert supersets[a, b] == (exact and alone[a % spans, b % spans])
    assert supersets[:, 0].all()


def test_precision_multiplies_what_formats_cost(profiles: Profiles) -> None:
    profile = profiles(formats=True).offering(("int8", "int4"))
    surrogate, spans = build(profile), len(profile.spans)
    raw, twice = surrogate.raw(), surrogate.raw(precision=2.0)
    np.testing.assert_array_equal(twice[..., :spans], raw[..., :spans])
    np.testing.assert_allclose(twice[..., ::spans], 2 * raw[..., ::spans])  # of everything, in each pair of formats
    pure = monotone(surrogate.influence.mean(0)[..., :spans], nested(profile.spans, 32, 512))
    np.testing.assert_allclose(surrogate.raw(precision=1e-9)[..., -spans:], pure, atol=1e-7)


def test_costs_are_monotone_and_full_is_free(profiles: Profiles) -> None:
    profile = profiles()
    noisy = profile.influence("robust") * np.exp(np.random.default_rng(0).normal(0, 2, (2, 6, 2, len(profile.rules))))
    surrogate = Surrogate.build(noisy, profile.rules, 32, 512).calibrated(Calibration(2.0, 0.8, 5))
    costs = surrogate.costs([1.0, 3.0])
    assert (costs[..., 0] == 0).all()
    for a, b in np.argwhere(surrogate.supersets):
        assert (costs[..., a] >= costs[..., b]).all()
    assert (surrogate.raw() >= surrogate.influence.mean(0) * (1 - 1e-12)).all()
    np.testing.assert_allclose(costs, 2.0 * surrogate.raw([1.0, 3.0]) ** 0.8)


def test_broken_influence_is_refused(profiles: Profiles) -> None:
    influence = profiles().influence("robust")
    influence[0, 0, 0, 1] = np.nan
    with pytest.raises(ArtefactError, match="not finite"):
        Surrogate.build(influence, profiles().rules, 32, 512)


def test_fit_finds_a_power_law_despite_an_outlier() -> None:
    x = np.logspace(-6, 0, 12)
    y = 3.0 * x**1.2 * np.exp(np.random.default_rng(0).normal(0, 0.05, 12))
    y[4] *= 1000
    found = fit(x, y)
    assert found.points == 12
    assert found.c == pytest.approx(3.0, rel=0.3)
    assert found.gamma == pytest.approx(1.2, abs=0.05)


def test_fit_stays_sane() -> None:
    x = np.logspace(-3, 0, 6)
    assert [fit(x, x**power).gamma for power in (0.3, 4)] == pytest.approx(GAMMA_RANGE)
    assert fit(x, np.zeros(6)) == Calibration()
    assert fit([], []) == Calibration()
    assert fit(x, -x) == Calibration()


def test_ablations_span_decades_and_layers(profiles: Profiles) -> None:
    surrogate = build(profiles(layers=12))
    influence = surrogate.raw()
    picks = pick_ablations(influence, 10, seed=0)
    assert picks == pick_ablations(influence, 10, seed=0)
    assert len(set(picks)) == 10
    values = [influence[pick] for pick in picks]
    assert max(values) / min(values) > 1e3
    assert len({layer for layer, _, _ in picks}) >= 8
    assert all(rule != 0 for _, _, rule in picks)
    assert pick_ablations(influence, 0, seed=0) == []
    assert pick_ablations(np.zeros_like(influence), 5, seed=0) == []
    assert len(pick_ablations(influence[:1, :1, :3], 50, seed=0)) <= 3


def test_predicted_kl_adds_up(profiles: Profiles) -> None:
    profile = profiles()
    surrogate = build(profile)
    assert surrogate.predicted(Plan.full(profile.shape)) == 0
    plan = Plan.uniform(profile.shape, profile.rules[3], 32)
    assert surrogate.predicted(plan) == pytest.approx(surrogate.costs()[..., 3].sum())
    assert surrogate.predicted(Plan.uniform(profile.shape, Rule(4, 33, 7), 32)) is None
