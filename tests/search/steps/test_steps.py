"""Steps alone: each takes a incumbent and returns one, and a further one needs no more than its line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moacompress.core.progress import SILENT
from moacompress.rules.plan import Plan
from moacompress.search import study
from moacompress.search.deadline import Deadline
from moacompress.search.problem.knapsack import Knapsack
from moacompress.search.search_context import Incumbent, SearchContext
from moacompress.search.search_request import SearchRequest
from moacompress.search.steps.parameter_study import tune_parameters
from moacompress.search.study import opened
from tests.search.conftest import Search, make_profile


@pytest.fixture
def context(pretended: Callable[..., Any]) -> Iterator[SearchContext]:
    """What steps work with, in which no step has run."""
    profile = make_profile(trials=2, alternatives=False)
    _, model = pretended(profile)
    request = SearchRequest.of(profile, "50%", profile.recipe)
    with opened(request, None, False, model, SILENT, Deadline()) as context:
        yield context


def test_the_study_measures_what_it_is_given(context: SearchContext, monkeypatch: pytest.MonkeyPatch) -> None:
    start = context.start()
    assert start.kls == []
    solved, choose = [], Knapsack.choose

    def counted(self: Knapsack, costs: Any) -> Any:
        solved.append(1)
        return choose(self, costs)

    monkeypatch.setattr(Knapsack, "choose", counted)
    best = tune_parameters(start, context)
    assert len(context.tried) == 2
    assert len(solved) == 1  # the plan of trial 0 was there
    assert context.tried[0].key == start.plan.key()
    assert len(best.kls) == context.evaluator.measure.size
    assert [stage.name.partition(",")[0] for stage in context.stages] == ["surrogate", "study"]


def test_a_further_step_is_one_line(search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Incumbent] = []

    def share(incumbent: Incumbent, context: SearchContext) -> Incumbent:
        given.append(incumbent)
        parameters = {**context.request.parameters.neutral, "depth_0": 0.5, "exponent": -0.2}
        bent = context.request.plan(parameters)
        assert bent.key() != incumbent.plan.key()
        found = context.measured(incumbent, bent, "share")
        context.add_stage("share", found, True)
        return found

    plain, _ = search(make_profile(trials=1, alternatives=False), out=tmp_path / "plain.json")
    monkeypatch.setattr(study, "STEPS", (*study.STEPS, share))
    found, fake = search(make_profile(trials=1, alternatives=False), out=tmp_path / "plan.json")
    assert given[0].plan.rules == plain.plan.rules
    written = Plan.load(tmp_path / "plan.json")
    assert written == found.plan
    assert written.rules != plain.plan.rules
    assert written.provenance["stage"] == "share"
    assert written.quality["measured_harm"]["plan"] == pytest.approx(np.mean(fake.kls(written)))
    assert found.explanation["stages"][-1]["name"] == "share"
