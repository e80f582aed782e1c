"""Which candidates of a family are measured, where a search offers formats."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from moacompress.calibration.profile.store import Profile
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.search.baselines.measured import nearly_predicted
from moacompress.search.problem.knapsack import chosen_plan
from moacompress.search.search_request import SearchRequest


def test_a_plan_of_candidates_is_predicted_as_it_is(profiles: Callable[..., Profile]) -> None:
    profile = profiles(formats=True)
    request = SearchRequest.of(profile, "50%", profile.recipe)
    kept = [rule.kept(512, 32) for rule in request.profile.rules]
    alone = [at for at, count in enumerate(kept) if kept.count(count) == 9]  # of its width there is but one span
    choice = np.random.default_rng(0).choice(alone, (6, 2))
    plan = chosen_plan(request.profile, choice)
    assert nearly_predicted(request.surrogate, plan, 512) == pytest.approx(request.surrogate.predicted(plan))


def test_others_are_as_the_widest_candidate_within(profiles: Callable[..., Profile]) -> None:
    profile = profiles(formats=True)
    request = SearchRequest.of(profile, "50%", profile.recipe)
    kls = []
    for rule in (Rule(4, 120, 0, "int8", "int4"), Rule(4, 500, 0, "int8", "int4"), Rule(4, 512, 0, "int8", "int4")):
        plan = Plan.uniform(profile.shape, rule, 32)
        kls.append(nearly_predicted(request.surrogate, plan, 512))
        near = [one for one in request.profile.rules if (one.key_format, one.value_format) == ("int8", "int4")]
        widest = max(
            (one for one in near if one.kept(512, 32) <= rule.kept(512, 32)), key=lambda one: one.kept(512, 32)
        )
        same = [one for one in near if one.kept(512, 32) == widest.kept(512, 32)]
        costs = [request.surrogate.costs()[..., request.profile.rules.index(one)].sum() for one in same]
        assert any(kls[-1] == pytest.approx(cost) for cost in costs)
    assert kls[0] > kls[1] > kls[2] > 0
