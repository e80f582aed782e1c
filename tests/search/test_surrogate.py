from __future__ import annotations

import numpy as np
import pytest

from moacompress.calibration.profile.store import Profile
from moacompress.core.errors import ArtefactError
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.windows import visible_intervals
from moacompress.search.predict.surrogate import Surrogate, monotone, nested
from tests.search.conftest import make_profile


def build(profile: Profile) -> Surrogate:
    return Surrogate.build(profile.influence("robust"), profile.rules, profile.min_window, max(profile.lengths))


def test_nested_means_that_every_visible_key_stays_visible() -> None:
    rules = make_profile().rules
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


def test_a_superset_keeps_as_exactly() -> None:
    profile = make_profile(formats=True).offering(("int8", "int4"))
    rules, spans = profile.rules, len(profile.spans)
    supersets, alone = nested(rules, 32, 512), nested(profile.spans, 32, 512)
    order = ("native", "int8", "int4")
    for a, small in enumerate(rules):
        for b, large in enumerate(rules):
            exact = order.index(large.key_format) <= order.index(small.key_format)
            exact &= order.index(large.value_format) <= order.index(small.value_format)
            assert supersets[a, b] == (exact and alone[a % spans, b % spans])
    assert supersets[:, 0].all()


def test_precision_multiplies_what_formats_cost() -> None:
    profile = make_profile(formats=True).offering(("int8", "int4"))
    surrogate, spans = build(profile), len(profile.spans)
    raw, twice = surrogate.costs(), surrogate.costs(precision=2.0)
    np.testing.assert_array_equal(twice[..., :spans], raw[..., :spans])
    np.testing.assert_allclose(twice[..., ::spans], 2 * raw[..., ::spans])  # of everything, in each pair of formats
    pure = monotone(surrogate.influence.mean(0)[..., :spans], nested(profile.spans, 32, 512))
    np.testing.assert_allclose(surrogate.costs(precision=1e-9)[..., -spans:], pure, atol=1e-7)


def test_costs_are_monotone_and_full_is_free() -> None:
    profile = make_profile()
    noisy = profile.influence("robust") * np.exp(np.random.default_rng(0).normal(0, 2, (2, 6, 2, len(profile.rules))))
    surrogate = Surrogate.build(noisy, profile.rules, 32, 512)
    costs = surrogate.costs([1.0, 3.0])
    assert (costs[..., 0] == 0).all()
    for a, b in np.argwhere(surrogate.supersets):
        assert (costs[..., a] >= costs[..., b]).all()
    assert (surrogate.costs() >= surrogate.influence.mean(0) * (1 - 1e-12)).all()


def test_broken_influence_is_refused() -> None:
    influence = make_profile().influence("robust")
    influence[0, 0, 0, 1] = np.nan
    with pytest.raises(ArtefactError, match="not finite"):
        Surrogate.build(influence, make_profile().rules, 32, 512)


def test_predicted_kl_adds_up() -> None:
    profile = make_profile()
    surrogate = build(profile)
    assert surrogate.predicted(Plan.full(profile.shape)) == 0
    plan = Plan.uniform(profile.shape, profile.rules[3], 32)
    assert surrogate.predicted(plan) == pytest.approx(surrogate.costs()[..., 3].sum())
    assert surrogate.predicted(Plan.uniform(profile.shape, Rule(4, 33, 7), 32)) is None
