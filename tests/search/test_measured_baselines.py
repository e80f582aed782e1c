"""Which candidates of a family are measured, where a search offers formats."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moacompress.core.progress import Progress
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.search.baselines.measured import measure_baseline_families, nearly_predicted
from moacompress.search.problem.knapsack import chosen_plan
from moacompress.search.search_request import SearchRequest
from tests.search.conftest import make_profile


def test_a_plan_of_candidates_is_predicted_as_it_is() -> None:
    profile = make_profile(formats=True)
    request = SearchRequest.of(profile, "50%", profile.recipe)
    kept = [rule.kept(512, 32) for rule in request.profile.rules]
    pairs = (1 + len(profile.profiled_formats)) ** 2
    alone = [at for at, count in enumerate(kept) if kept.count(count) == pairs]  # of its width there is but one span
    choice = np.random.default_rng(0).choice(alone, (6, 2))
    plan = chosen_plan(request.profile, choice)
    assert nearly_predicted(request.surrogate, plan, 512) == pytest.approx(request.surrogate.predicted(plan))


def test_others_are_as_the_widest_candidate_within() -> None:
    profile = make_profile(formats=True)
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


def test_progress_counts_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step for every candidate and one for every family, each once, though another worker is at one of them at first."""
    field = {"uniform": ["a", "b", "c"], "duo": ["d"], "moa": []}
    taken, waited = {"screening:b"}, []
    measured = "moacompress.search.baselines.measured"
    monkeypatch.setattr(f"{measured}.families_of", lambda request: list(field))
    monkeypatch.setattr(f"{measured}._candidates", lambda family, request: field[family])

    def pause(names: list[str]) -> None:
        waited.extend(names)
        taken.clear()

    evaluator: Any = SimpleNamespace(
        order=range(5),
        job=lambda kind, plan, numbers, lost=None: SimpleNamespace(name=f"{kind}:{plan}", count=len(numbers)),
        attempt=lambda job: None if job.name in taken else [float("abcd".index(job.name[-1]))] * job.count,
        pause=pause,
    )
    told: list[str] = []

    class Told(Progress):
        def start(self, what: str, total: int) -> None:
            told.append(str(total))

        def step(self, note: str = "") -> None:
            told.append(note)

    request: Any = SimpleNamespace()
    found = dict(measure_baseline_families(request, evaluator, [9.0] * 5, Told()))
    assert {family: best and best.kl for family, best in found.items()} == {"duo": 3.0, "moa": None, "uniform": 0.0}
    assert told == ["7", "", "", "", "duo: 3 nats", "nothing fits", "", "uniform: 0 nats"]
    assert waited == ["screening:b"]
