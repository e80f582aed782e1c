"""A search from what is asked for to the plan that it returns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest

from moacompress.core.errors import ArtefactError, BudgetError, InfeasibleBudgetError, ModelError
from moacompress.core.progress import Progress
from moacompress.rules.formats import CODED
from moacompress.rules.plan import Plan
from moacompress.search.baselines.families import FAMILIES, family_plans
from moacompress.search.baselines.measured import CANDIDATES
from moacompress.search.study import find_plan
from tests.search.conftest import Search, make_profile, model_of


def test_search_finds_a_plan_within_the_budget(search: Search, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    profile = make_profile(trials=12)
    result, fake = search(profile, out=out)
    plan = Plan.load(out)
    assert plan == result.plan
    assert result.path == out
    for n in profile.lengths:
        assert plan.kv_bytes(n) <= profile.shape.dense_kv_bytes(n) // 2
        assert result.kv_bytes[str(n)] == {"dense": profile.shape.dense_kv_bytes(n), "plan": plan.kv_bytes(n)}
    assert result.trials == 12
    assert 8 <= result.measured_plans <= 12
    assert result.harm["plan"] <= result.harm["trial0"] * 1.2
    assert result.harm["plan"] < result.harm["uniform"]
    assert result.harm["plan"] == pytest.approx(np.mean(fake.kls(plan)))
    assert plan.provenance["source"] == "model"
    assert plan.provenance["profile"] == profile.fingerprint
    assert plan.provenance["recipe"]["budget"] == ["50%"]
    assert plan.budget["asked"] == ["50%"]
    assert plan.quality["samples"] == 8
    assert plan.quality["baselines"]["uniform"]["harm"] == result.harm["uniform"]
    assert all(
        plan.quality["baselines"]["uniform"]["kv_bytes"][str(n)] <= profile.shape.dense_kv_bytes(n) // 2
        for n in profile.lengths
    )
    assert set(result.harm) == {"plan", "trial0", *FAMILIES}
    assert result.harm["moa"] is None  # the profile has no such statistics
    for family in ("per_layer", "duo"):
        note = plan.quality["baselines"][family]
        assert result.harm["plan"] < note["harm"] == result.harm[family]
        assert note["sink"] in (4, 16, 64)
    assert optuna.logging.get_verbosity() == optuna.logging.INFO


def test_the_recipe_of_a_plan_says_what_was_profiled(search: Search, tmp_path: Path) -> None:
    profile = make_profile(trials=1)
    other = profile.recipe.override(calibration__samples=99, profile__draws=7, search__classes=3)
    found, _ = search(profile, out=tmp_path / "plan.json", recipe=other)
    recipe = found.plan.provenance["recipe"]
    assert recipe["calibration"]["samples"] == profile.recipe.calibration.samples != 99
    assert recipe["profile"]["draws"] == profile.recipe.profile.draws != 7
    assert recipe["search"]["classes"] == 3


def test_bits_are_spent_where_they_are_worth_it(search: Search, tmp_path: Path) -> None:
    profile = make_profile(layers=12, formats=True, trials=4)
    spans, _ = search(profile, "25%", recipe=profile.recipe.override(search__formats="native"))
    found, fake = search(profile, "25%", out=tmp_path / "plan.json")
    assert found.harm["plan"] < spans.harm["plan"] / 3
    assert found.harm["plan"] == pytest.approx(np.mean(fake.kls(found.plan)))
    for family in ("uniform", "per_layer", "duo"):  # what needs no search has formats too
        assert found.harm["plan"] < found.harm[family] < spans.harm[family]
    assert found.harm["plan"] < found.harm["quantized"]
    assert spans.harm["quantized"] is None
    notes = found.plan.quality["baselines"]
    assert set(notes["quantized"]["formats"]) <= {*CODED}
    assert notes["quantized"]["kv_bytes"]["512"] <= profile.shape.dense_kv_bytes(512) // 4
    for n in profile.lengths:
        assert found.plan.kv_bytes(n) <= profile.shape.dense_kv_bytes(n) // 4
    assert "precision" in found.plan.provenance["knobs"]
    assert "precision" not in spans.plan.provenance["knobs"]
    told = found.explanation["formats"]
    pairs = {(pair["key_format"], pair["value_format"]): pair for pair in told["pairs"]}
    assert len(pairs) > 1
    assert sum(pair["kv_heads"] for pair in told["pairs"]) == 24
    assert sum(pair["kv_bytes"] for pair in told["pairs"]) == found.plan.kv_bytes(512)
    assert told["bits"]["values"] < told["bits"]["keys"] < 32  # values lose less
    assert spans.explanation["formats"]["bits"] == {"keys": 32.0, "values": 32.0}
    assert set(found.explanation["kinds"]) == {"answer"}
    again, fake = search(profile, "25%", out=tmp_path / "plan.json")
    assert (again.plan, fake.calls) == (found.plan, [])


def test_baselines_are_each_at_their_best(search: Search) -> None:
    result, fake = search(make_profile(trials=1, samples=24))
    profile, notes = fake.profile, result.plan.quality["baselines"]
    limits = {n: profile.shape.dense_kv_bytes(n) // 2 for n in profile.lengths}
    for family in ("uniform", "per_layer", "duo"):
        plans = family_plans(family, profile.shape, limits, profile, (4, 16, 64))[:CANDIDATES]
        # samples only scale the KL here, so that the screening finds the best
        least = min((fake.kls(plan) for plan in plans), key=np.mean)
        measured = notes[family]["samples"]
        order = np.random.default_rng(profile.recipe.seed).permutation(len(least))[:measured]
        assert result.harm[family] == pytest.approx(np.mean([least[number] for number in order]))
        assert np.mean(least) > result.harm["plan"]
        assert 6 <= measured < 24  # it has lost: fewer samples tell no two plans apart, and more decide nothing


def test_bad_requests_fail_before_anything_is_measured(search: Search, tmp_path: Path) -> None:
    profile = make_profile()
    other = replace(profile, shape=replace(profile.shape, weights_fingerprint="other"))
    with pytest.raises(ModelError, match="other weights"):
        search(profile, model=model_of(other))
    with pytest.raises(ArtefactError, match=r"no profile\.json"):
        find_plan(tmp_path, "25%")


def test_the_explanation_has_the_gain_of_what_was_not_kept(search: Search) -> None:
    result, _ = search(make_profile(trials=6))
    told = result.explanation
    assert [trial["trial"] for trial in told["trials"] if trial["kept"]] == [result.best_trial]
    for trial in told["trials"][1:]:
        apart = trial["difference"]
        better = not trial["pruned"] and apart["value"] + 2 * apart["standard_error"] < 0
        assert better or not trial["kept"]
    first, *others = told["stages"]
    assert first["difference"] is None
    assert all(stage["difference"]["value"] < 0 or not stage["kept"] or stage["name"] == "rest" for stage in others)


def test_steps_only_ever_help(search: Search, tmp_path: Path) -> None:
    one_shot = search(make_profile(trials=1))[0]
    out = tmp_path / "plan.json"
    improved, fake = search(make_profile(trials=14), out=out)
    assert improved.harm["trial0"] == one_shot.harm["plan"]
    assert improved.harm["plan"] < one_shot.harm["plan"]
    assert improved.harm["plan"] == pytest.approx(np.mean(fake.kls(improved.plan)))
    for n in fake.profile.lengths:
        assert improved.plan.kv_bytes(n) <= fake.profile.shape.dense_kv_bytes(n) // 2
    stages = improved.explanation["stages"]
    assert [stage["name"].partition(",")[0] for stage in stages][:2] == ["surrogate", "study"]
    kept = [stage for stage in stages if stage["kept"]]
    kls = [stage["harm"] for stage in kept]
    assert kls == sorted(kls, reverse=True)
    assert improved.plan.provenance["stage"].startswith(("trial", "rest"))
    again, fake = search(make_profile(trials=14), out=out)
    assert fake.calls == []
    assert again.explanation == improved.explanation == json.loads((tmp_path / "plan.explain.json").read_text())


def test_a_floor_keeps_a_layer(search: Search) -> None:
    found = search(make_profile(trials=1, floors={0: 1.0, 2: 0.5}), "60%")[0]
    assert all(rule.is_full for rule in found.plan.rules[0])
    for n in (256, 512):
        assert all(rule.slots(n, 32) >= n // 2 for rule in found.plan.rules[2])
    with pytest.raises(InfeasibleBudgetError, match="at least"):
        search(make_profile(trials=1, floors={0: 1.0, 1: 1.0, 2: 1.0}), "20%")
    with pytest.raises(BudgetError, match="a floor is asked for in layer 9"):
        search(make_profile(trials=1, floors={9: 0.5}))


class Told(Progress):
    """Keeps what a search tells of its stages and tasks: how many steps each task is to have, how many it had, and beats."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.task = ""
        self.tasks: dict[str, list[int]] = {}
        self.planned: Mapping[str, float | None] = {}

    def plan(self, stages: Mapping[str, float | None], *, in_seconds: bool = False) -> None:
        self.planned = stages

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def start(self, what: str, total: int) -> None:
        self.task = what
        self.tasks[what] = [total, 0, 0]

    def step(self, note: str = "") -> None:
        self.tasks[self.task][1] += 1

    def beat(self) -> None:
        self.tasks[self.task][2] += 1  # fails between two tasks: then a person sees nothing of it

    def done(self) -> None:
        self.task = ""


def test_every_stage_is_told_and_nothing_is_measured_in_silence(search: Search) -> None:
    told = Told()
    _, fake = search(make_profile(trials=3, classes=4), progress=told)
    assert list(told.planned) == ["trials", "leftover", "baselines", "class limit"]
    assert [name for name in told.stages if name] == list(told.planned)
    rest = told.tasks["measuring the plan without a class limit"]
    assert rest[:2] == [8, 8]  # samples
    assert sum(beats for _, _, beats in told.tasks.values()) >= len(fake.calls)
