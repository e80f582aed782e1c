"""Several plans of one profile: budgets with commas, the smallest budget for a loss."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moacompress.calibration.profile.store import Profile
from moacompress.core.artefact_names import front_file
from moacompress.core.errors import ArtefactError, BudgetError, InfeasibleBudgetError, OutOfTimeError, UsageError
from moacompress.core.lock_holders import own_file
from moacompress.report.search_tables import loss_lines
from moacompress.rules.budget import label, split_budgets
from moacompress.rules.limits import layer_floors, meets
from moacompress.rules.loss import Loss
from moacompress.rules.plan import Plan
from moacompress.run_checks import check_recipe
from moacompress.search.plan_sets import find_plans, find_smallest, smallest_share
from moacompress.search.study import find_plan
from tests.search.conftest import make_profile, model_of


@pytest.fixture
def fake(pretended: Callable[..., Any]) -> Any:
    return pretended(make_profile())[0]


def options(profile: Profile, out: Path, **more: Any) -> dict[str, Any]:
    """What searches take beside the profile and what is asked for."""
    return {"recipe": profile.recipe, "out": out, "model": model_of(profile), **more}


def test_commas_ask_for_several_plans() -> None:
    assert split_budgets(["50%, 25%,12.5%"]) == [("50%",), ("25%",), ("12.5%",)]
    assert split_budgets(["50%,25%", "1MiB@8k"]) == [("50%", "1MiB@8k"), ("25%", "1MiB@8k")]
    assert split_budgets(["25%"]) == [("25%",)]
    with pytest.raises(BudgetError, match="the same plan twice"):
        split_budgets(["25%,0.25"])
    with pytest.raises(BudgetError, match="the budget is empty"):
        split_budgets(["25%,"])
    assert [label(budgets) for budgets in (["12.5%"], ["25%@8k", "1MiB@32k"])] == ["12.5", "25-8k_1MiB-32k"]


def test_a_plan_for_each_budget_and_the_front(fake: Any, tmp_path: Path) -> None:
    profile = make_profile(trials=4)
    asked = split_budgets(["60%,40%,25%"])
    found = find_plans(profile, asked, **options(profile, tmp_path / "plan.json"))
    for result, share in zip(found, (0.6, 0.4, 0.25), strict=True):
        assert result.path == tmp_path / f"plan-{share * 100:.0f}.json"
        assert Plan.load(result.path) == result.plan
        assert all(result.plan.kv_share(n) <= share for n in profile.lengths)
    points = json.loads((tmp_path / "plan.front.json").read_text())["points"]
    assert [point["plan"] for point in points] == ["plan-25.json", "plan-40.json", "plan-60.json"]
    assert [point["harm"]["plan"] for point in points] == sorted((r.harm["plan"] or 0.0 for r in found), reverse=True)
    calls = len(fake.calls)
    again = find_plans(profile, asked, **options(profile, tmp_path / "plan.json"))
    assert [result.plan for result in again] == [result.plan for result in found]
    assert len(fake.calls) == calls
    find_plans(profile, asked, overwrite=True, **options(profile, tmp_path / "plan.json"))
    assert fake.calls[calls:] == fake.calls[:calls]
    before = set(tmp_path.iterdir())
    with pytest.raises(InfeasibleBudgetError):  # nothing runs where one of them cannot be met
        find_plans(profile, split_budgets(["55%,1%"]), **options(profile, tmp_path / "new.json"))
    assert set(tmp_path.iterdir()) == before


def test_several_budgets_share_the_time(fake: Any, clock: Any, tmp_path: Path) -> None:
    profile = make_profile(trials=3, timeout=90)
    found = find_plans(profile, split_budgets(["60%,40%,25%"]), **options(profile, tmp_path / "plan.json"))
    assert len(fake.calls) <= 90 + 1
    for result in found:  # 30 measurements end the trials, and not the baselines
        assert result.harm["plan"] is not None
        assert result.harm["per_layer"] is None
        assert not result.plan.provenance["finished"]
    assert all(result.path and Plan.load(result.path) == result.plan for result in found)


@pytest.mark.heavy
def test_a_smallest_budget_ends_with_what_is_measured(fake: Any, clock: Any, tmp_path: Path) -> None:
    profile = make_profile(trials=12)

    def within(out: str, timeout: float) -> dict[str, Any]:
        clock.now = 0.0
        fake.calls.clear()
        return options(profile, tmp_path / out, recipe=profile.recipe.override(search__timeout=timeout))

    loss = Loss.parse("5%")
    with pytest.raises(OutOfTimeError, match=r"5 seconds of --timeout were over before .* a longer one resumes"):
        find_smallest(profile, loss, **within("plan.json", 5))
    assert len(fake.calls) <= 6
    smallest = find_smallest(profile, loss, **within("least.json", 20))
    assert len(fake.calls) <= 21
    assert (smallest.harm["plan"] or 9.9) <= loss.kl
    rest = find_smallest(profile, loss, **within("least.json", 1e6))
    assert rest.plan.kv_share(512) <= smallest.plan.kv_share(512)


def test_scouts_are_not_written_through_a_link(fake: Any, tmp_path: Path) -> None:
    profile = make_profile(trials=4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "plan.scouts").symlink_to(tmp_path / "mine")
    with pytest.raises(ArtefactError, match=r"plan.scouts is a link, which is not followed"):
        find_smallest(profile, Loss.parse("5%"), **options(profile, tmp_path / "plan.json"))
    assert not any((tmp_path / "mine").iterdir())


@pytest.mark.parametrize("share", ["1%", "20%"])
def test_the_smallest_budget_for_a_loss(fake: Any, tmp_path: Path, share: str) -> None:
    profile = make_profile(trials=4)
    out, loss = tmp_path / "plan.json", Loss.parse(share)
    assert loss.kl == pytest.approx(math.log1p(float(share[:-1]) / 100))
    found = find_smallest(profile, loss, **options(profile, out))
    assert (found.harm["plan"] or 0.0) < found.plan.quality["harm_upper95"] <= loss.kl  # not the mean alone
    (line,) = loss_lines(found.plan)
    assert f"{len(profile.validation)} samples" in line
    assert Plan.load(out) == found.plan
    assert found.plan.budget["max_loss"] == share
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "plan.explain.json", "plan.scouts"}
    assert json.loads((tmp_path / "plan.explain.json").read_text()) == found.explanation
    # somewhat less does not hold, by the surrogate's own plan
    kept = int(found.plan.budget["asked"][0][:-1])
    if kept * 0.8 / 100 > smallest_share(profile, profile.recipe):
        quick = profile.recipe.override(search__trials=1, search__alternatives=False)
        less = find_plan(profile, f"{int(kept * 0.8)}%", recipe=quick, model=model_of(profile))
        assert less.plan.quality["harm_upper95"] > loss.kl
    calls = len(fake.calls)
    assert find_smallest(profile, loss, **options(profile, out)).plan == found.plan
    assert len(fake.calls) == calls
    with pytest.raises(ArtefactError, match="of another search"):
        find_smallest(profile, Loss.parse("3%"), **options(profile, out))


def test_a_loss_takes_five_validation_samples(tmp_path: Path) -> None:
    profile = make_profile()
    few = replace(profile, validation=profile.validation[:4])
    with pytest.raises(
        UsageError, match=r"at least 5 validation samples, and there are 4; profile with --validation-samples"
    ):
        find_smallest(few, Loss.parse("1%"), recipe=few.recipe, out=tmp_path / "plan.json")
    asked = few.recipe.override(max_loss="1%", budget=[], calibration__validation_samples=4)
    with pytest.raises(UsageError, match="at least 5 validation samples"):
        check_recipe(asked)


def test_the_smallest_budget_keeps_floors_and_counts_layers_that_share(fake: Any, tmp_path: Path) -> None:
    profile = make_profile(trials=1, floors={0: 1.0, 1: 0.8})
    assert smallest_share(profile, profile.recipe) > smallest_share(profile, profile.recipe.override(search__floors={}))
    kept = []
    for loss in ("50%", "100%"):
        found = find_smallest(profile, Loss.parse(loss), **options(profile, tmp_path / f"{loss}.json"))
        assert meets(found.plan, layer_floors({0: 1.0, 1: 0.8}, profile.shape), profile.lengths)
        kept.append(found.plan.kv_bytes(512))
    assert kept[1] <= kept[0]
    shared = make_profile(layers=9, anchors=2, copying=1e-6)
    with_copies = shared.recipe.override(search__share="3")
    assert smallest_share(shared, with_copies) < smallest_share(shared, shared.recipe)


@pytest.mark.heavy
def test_overwrite_starts_the_smallest_budget_anew(fake: Any, tmp_path: Path) -> None:
    profile, out = make_profile(trials=2), tmp_path / "plan.json"
    given = options(profile, out)
    first = find_smallest(profile, Loss.parse("5%"), **given)
    calls = fake.calls[:]
    (tmp_path / "plan.scouts" / "7.json").write_text("of before")
    (tmp_path / "plan.txt").write_text("mine")
    fake.calls.clear()
    again = find_smallest(profile, Loss.parse("5%"), overwrite=True, **given)
    assert fake.calls == calls
    assert again.plan == first.plan
    assert not (tmp_path / "plan.scouts" / "7.json").exists()
    assert (tmp_path / "plan.txt").exists()
    assert find_smallest(profile, Loss.parse("20%"), overwrite=True, **given).plan.budget["max_loss"] == "20%"


def test_a_second_run_beside_the_first_is_refused(fake: Any, tmp_path: Path) -> None:
    profile, out = make_profile(trials=2), tmp_path / "plan.json"
    with own_file(out), own_file(front_file(out)):
        with pytest.raises(ArtefactError, match="plan.json is in use: process .* another file"):
            find_plan(profile, "50%", **options(profile, out))
        with pytest.raises(ArtefactError, match="plan.front.json is in use"):
            find_plans(profile, split_budgets(["60%,22%"]), **options(profile, out))
        with pytest.raises(ArtefactError, match="plan.json is in use"):
            find_smallest(profile, Loss.parse("5%"), **options(profile, out))
    assert fake.calls == []


def test_a_loss_that_nothing_holds(fake: Any, tmp_path: Path) -> None:
    profile = make_profile(trials=1)
    with pytest.raises(
        InfeasibleBudgetError, match=r"with 95% confidence on 8 samples: even 99% of the bytes may cost more"
    ):
        find_smallest(profile, Loss("tiny", 1e-9), **options(profile, tmp_path / "plan.json"))


@pytest.mark.parametrize("text", ["", "0", "0%", "-1%", "200%", "1 nat", "one"])
def test_losses_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="is not understood"):
        Loss.parse(text)


def test_several_budgets_resume_with_more_trials(fake: Any, tmp_path: Path) -> None:
    """What won at the first budget is tried first at the second, which is no other search for that."""
    knobs = []
    for trials in (1, 6):
        profile = make_profile(trials=trials)
        given = options(profile, tmp_path / "plan.json")
        found = find_plans(profile, split_budgets(["60%,40%"]), **given)
        assert [result.trials for result in found] == [trials, trials]
        knobs.append(found[0].plan.provenance["knobs"])
    assert knobs[0] != knobs[1]
