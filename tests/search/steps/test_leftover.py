"""What is left of the budget is spent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moacompress.rules.plan import Plan
from moacompress.search.problem.knapsack import Knapsack
from moacompress.search.search_context import Incumbent, SearchContext
from tests.search.conftest import Search, make_profile


def test_what_is_left_is_spent_unless_that_measures_worse(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the solver is held to the narrowest rule of all KV heads."""

    def shares(plan: Plan) -> list[float]:
        return [plan.kv_share(n) for n in (256, 512)]

    monkeypatch.setattr(Knapsack, "choose", lambda self, costs: np.ones(costs.shape[:2], np.int64))
    spent = search(make_profile(trials=1, alternatives=False))[0]
    stages = spent.explanation["stages"]
    assert [stage["name"] for stage in stages] == ["surrogate", "study", "rest"]
    assert stages[-1]["kept"]
    assert max(shares(spent.plan)) > 0.45
    measured = SearchContext.measured

    def worse(self: SearchContext, incumbent: Incumbent, plan: Plan, stage: str) -> Incumbent:
        found = measured(self, incumbent, plan, stage)
        return replace(found, kls=[100 * kl for kl in found.kls]) if stage == "rest" else found

    monkeypatch.setattr(SearchContext, "measured", worse)
    left = search(make_profile(trials=1, alternatives=False))[0]
    assert not left.explanation["stages"][-1]["kept"]
    assert max(shares(left.plan)) < max(shares(spent.plan))
