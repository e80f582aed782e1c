"""Several plans of one profile: budgets with commas, the front, the smallest budget for a loss."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moacompress.calibration.store import Profile
from moacompress.core.errors import ArtefactError, BudgetError, InfeasibleBudgetError, UsageError
from moacompress.rules.budget import label, split_budgets
from moacompress.rules.plan import Plan
from moacompress.search import front, study
from moacompress.search.front import find_front
from moacompress.search.plan_sets import Loss, find_plans, find_smallest, smallest_share

Profiles = Callable[..., Profile]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, profiles: Profiles, fake_objective: Any) -> Any:
    found = fake_objective(profiles())
    for module in (study, front):
        monkeypatch.setattr(module, "Objective", lambda model, samples: found)
    return found


def model(profile: Profile) -> Any:
    return SimpleNamespace(model=None, source="model", shape=profile.shape)


def test_commas_ask_for_several_plans() -> None:
    assert split_budgets(["50%, 25%,12.5%"]) == [("50%",), ("25%",), ("12.5%",)]
    assert split_budgets(["50%,25%", "1MiB@8k"]) == [("50%", "1MiB@8k"), ("25%", "1MiB@8k")]
    assert split_budgets(["25%"]) == [("25%",)]
    with pytest.raises(BudgetError, match="the same plan twice"):
        split_budgets(["25%,0.25"])
    with pytest.raises(BudgetError, match="is not understood"):
        split_budgets(["25%,"])
    assert [label(budgets) for budgets in (["12.5%"], ["25%@8k", "1MiB@32k"])] == ["12.5", "25-8k_1MiB-32k"]


def test_a_plan_for_each_budget_and_the_front(fake: Any, profiles: Profiles, tmp_path: Path) -> None:
    profile = profiles(trials=4)
    asked = split_budgets(["60%,40%,25%"])
    found = find_plans(profile, asked, recipe=profile.recipe, out=tmp_path / "plan.json", model=model(profile))
    for result, share in zip(found, (0.6, 0.4, 0.25), strict=True):
        assert result.path == tmp_path / f"plan-{share * 100:.0f}.json"
        assert Plan.load(result.path) == result.plan
        assert all(result.plan.kv_share(n) <= share for n in profile.lengths)
    points = json.loads((tmp_path / "plan.front.json").read_text())["points"]
    assert [point["plan"] for point in points] == ["plan-25.json", "plan-40.json", "plan-60.json"]
    assert [point["harm"]["plan"] for point in points] == sorted((r.harm["plan"] or 0.0 for r in found), reverse=True)
    calls = len(fake.calls)
    again = find_plans(profile, asked, recipe=profile.recipe, out=tmp_path / "plan.json", model=model(profile))
    assert [result.plan for result in again] == [result.plan for result in found]
    assert len(fake.calls) == calls
    before = set(tmp_path.iterdir())
    with pytest.raises(InfeasibleBudgetError):  # nothing runs where one of them cannot be met
        find_plans(
            profile, split_budgets(["55%,1%"]), recipe=profile.recipe, out=tmp_path / "new.json", model=model(profile)
        )
    assert set(tmp_path.iterdir()) == before


def test_the_front_of_harm_and_bytes(fake: Any, profiles: Profiles, tmp_path: Path) -> None:
    profile = profiles(trials=12)
    out = tmp_path / "plan.json"
    found = find_front(profile, ["60%", "22%"], recipe=profile.recipe, out=out, model=model(profile))
    shares = [max(result.plan.kv_share(n) for n in profile.lengths) for result in found]
    harms = [result.harm["plan"] or 0.0 for result in found]
    assert len(found) > 3
    assert shares == sorted(shares)
    assert harms == sorted(harms, reverse=True)
    assert 0.1 < shares[0] <= 0.22
    assert 0.4 < shares[-1] <= 0.6
    assert [Plan.load(tmp_path / f"plan-front-{i + 1}.json") for i in range(len(found))] == [r.plan for r in found]
    assert len(json.loads((tmp_path / "plan.front.json").read_text())["points"]) == len(found)
    calls = len(fake.calls)
    again = find_front(profile, ["22%", "60%"], recipe=profile.recipe, out=out, model=model(profile))
    assert [result.plan for result in again] == [result.plan for result in found]
    assert len(fake.calls) == calls
    for budgets in (["25%"], ["25%", "25%"], ["25%@8k", "50%"], ["25%", "1MiB@8k"], []):
        with pytest.raises(BudgetError, match="a front lies between two shares"):
            find_front(profile, budgets, recipe=profile.recipe, out=out, model=model(profile))


@pytest.mark.parametrize("share", ["1%", "5%", "20%"])
def test_the_smallest_budget_for_a_loss(fake: Any, profiles: Profiles, tmp_path: Path, share: str) -> None:
    profile = profiles(trials=4)
    out, loss = tmp_path / "plan.json", Loss.parse(share)
    assert loss.harm == pytest.approx(math.log1p(float(share[:-1]) / 100))
    found = find_smallest(profile, loss, recipe=profile.recipe, out=out, model=model(profile))
    assert (found.harm["plan"] or 0.0) <= loss.harm
    assert Plan.load(out) == found.plan
    assert found.plan.budget["max_loss"] == share
    # somewhat less does not hold, by the surrogate's own plan
    kept = int(found.plan.budget["asked"][0][:-1])
    if kept * 0.8 / 100 > smallest_share(profile):
        less = study.find_plan(profile, f"{int(kept * 0.8)}%", recipe=profile.recipe, model=model(profile))
        assert (less.harm["trial0"] or 0.0) > loss.harm
    calls = len(fake.calls)
    assert find_smallest(profile, loss, recipe=profile.recipe, out=out, model=model(profile)).plan == found.plan
    assert len(fake.calls) == calls
    with pytest.raises(ArtefactError, match="of another search"):
        find_smallest(profile, Loss.parse("3%"), recipe=profile.recipe, out=out, model=model(profile))


def test_a_loss_that_nothing_holds(fake: Any, profiles: Profiles, tmp_path: Path) -> None:
    profile = profiles(trials=1)
    with pytest.raises(InfeasibleBudgetError, match="even 99% of the bytes cost more"):
        find_smallest(
            profile, Loss("tiny", 1e-9), recipe=profile.recipe, out=tmp_path / "plan.json", model=model(profile)
        )


@pytest.mark.parametrize("text", ["", "0", "0%", "-1%", "200%", "1 nat", "one"])
def test_losses_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="is not understood"):
        Loss.parse(text)
