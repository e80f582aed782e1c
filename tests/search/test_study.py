from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest

from moacompress.calibration.store import Profile
from moacompress.core.errors import ArtefactError, BudgetError, InfeasibleBudgetError, ModelError
from moacompress.core.progress import Progress
from moacompress.rules.plan import Plan
from moacompress.search import study
from moacompress.search.alternatives import CANDIDATES
from moacompress.search.baselines import FAMILIES, family_plans
from moacompress.search.knapsack import Knapsack
from moacompress.search.study import find_plan

Profiles = Callable[..., Profile]
Search = Callable[..., tuple[Any, Any]]

HERE = Path(__file__).resolve().parent


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch, profiles: Profiles, fake_objective: Any) -> Search:
    """Runs `find_plan` without a model; returns the result and the stand-in that counted."""

    def run(
        profile: Profile | None = None, budget: Any = "50%", dies_at: int | None = None, **arguments: Any
    ) -> tuple[Any, Any]:
        profile = profile or profiles()
        fake = fake_objective(profile, dies_at)
        monkeypatch.setattr(study, "Objective", lambda model, samples: fake)
        monkeypatch.setattr(study, "_around", lambda *arguments: fake.around)
        monkeypatch.setattr(Profile, "calibration_samples", lambda self: self.validation)
        source = SimpleNamespace(model=None, source="model", shape=profile.shape)
        arguments.setdefault("model", source)
        try:
            return find_plan(profile, budget, **arguments), fake
        except KeyboardInterrupt:
            return None, fake

    return run


def test_search_finds_a_plan_within_the_budget(search: Search, profiles: Profiles, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    profile = profiles(trials=12)
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
    assert result.harm["plan"] == pytest.approx(np.mean(_harms(fake, plan)))
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


def test_alternatives_are_each_at_their_best(search: Search, profiles: Profiles) -> None:
    result, fake = search(profiles(trials=1))
    profile = fake.profile
    limits = {n: profile.shape.dense_kv_bytes(n) // 2 for n in profile.lengths}
    for family in ("uniform", "per_layer", "duo"):
        plans = family_plans(family, profile.shape, limits, profile, (4, 16, 64))[:CANDIDATES]
        # samples only scale the harm here, so that the screening finds the best
        assert result.harm[family] == pytest.approx(min(np.mean(_harms(fake, plan)) for plan in plans))


def test_the_plan_of_every_baseline_is_beside_the_found_one(search: Search, profiles: Profiles, tmp_path: Path) -> None:
    result, fake = search(profiles(trials=1), out=tmp_path / "plan.json")
    written = {path.stem: Plan.load(path) for path in (tmp_path / "plan.baselines").iterdir()}
    assert set(written) == {"uniform", "per_layer", "duo"}
    for family, plan in written.items():
        assert plan.key() == result.plan.quality["baselines"][family]["key"]
        assert np.mean(_harms(fake, plan)) == pytest.approx(result.harm[family])
        assert plan.quality["measured_harm"]["plan"] == result.harm[family]
        assert plan.provenance["baseline"] == family
    search(profiles(trials=1, alternatives=False), out=tmp_path / "other.json")
    assert not (tmp_path / "other.baselines").exists()


def _harms(fake: Any, plan: Plan) -> list[float]:
    with fake.under(plan) as harm:
        return [harm(number) for number in range(fake.size)]


def test_same_seed_same_plan_without_storage(search: Search, profiles: Profiles) -> None:
    first, second = search()[0], search()[0]
    assert first.plan == second.plan
    other = search(recipe=profiles().recipe.override(seed=5))[0]
    assert other.plan.provenance["search"] != first.plan.provenance["search"]


def test_killed_at_any_point_the_same_call_ends_the_same(search: Search, profiles: Profiles, tmp_path: Path) -> None:
    whole, fake = search(out=tmp_path / "whole.json")
    total = len(fake.calls)
    out, measured, runs = tmp_path / "plan.json", [], 0
    result = None
    while result is None:
        runs += 1
        result, fake = search(out=out, dies_at=17)
        measured += fake.calls
    assert runs > 5
    assert result.plan == whole.plan
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    # only the plan at hand when it died is measured again: at most its 8 samples a run
    assert len(measured) - total <= 8 * (runs - 1)
    finished, fake = search(out=out)
    assert fake.calls == []
    assert finished.plan == whole.plan


SCRIPT = """
import importlib.util, sys
from types import SimpleNamespace
spec = importlib.util.spec_from_file_location("fakes", sys.argv[1])
fakes = importlib.util.module_from_spec(spec); spec.loader.exec_module(fakes)
from moacompress.search import study
from moacompress.search.alternatives import CANDIDATES
from moacompress.search.baselines import FAMILIES, family_plans
from moacompress.search.knapsack import Knapsack
profile = fakes.make_profile()
study.Objective = lambda model, samples: fakes.FakeObjective(profile, int(sys.argv[3]), kills=True)
source = SimpleNamespace(model=None, source="model", shape=profile.shape)
study.find_plan(profile, "50%", out=sys.argv[2], model=source)
"""


def test_sigkill_and_again(search: Search, tmp_path: Path) -> None:
    whole, fake = search(out=tmp_path / "whole.json")
    out = tmp_path / "plan.json"
    half = len(fake.calls) // 2 + 20
    command = [sys.executable, "-c", SCRIPT, str(HERE / "conftest.py"), str(out), str(half)]
    killed = subprocess.run(command, cwd=HERE.parent.parent, capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr.decode()
    journal = tmp_path / "plan.study.journal"
    with journal.open("ab") as file:
        file.write(b'{"op_code": 8, "worker')  # what a kill in the middle of a write leaves
    result, rest = search(out=out)
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert result.plan == whole.plan
    assert len(rest.calls) + half - len(fake.calls) <= 8


def test_more_trials_go_on_with_the_same_study(search: Search, profiles: Profiles, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    search(profiles(trials=4), out=out)
    result, fake = search(profiles(trials=7), out=out)
    assert result.trials == 7
    assert len(fake.calls) <= 3 * 8
    again, fake = search(profiles(trials=5), out=out)
    assert again.trials == 7
    assert fake.calls == []


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_storage_resumes(search: Search, profiles: Profiles, tmp_path: Path, kind: str) -> None:
    storage = f"sqlite:///{tmp_path}/s.db" if kind == "sqlite" else str(tmp_path / "sub" / "s.log")
    profile = profiles(trials=6, storage=storage)
    killed, _ = search(profile, dies_at=60)
    assert killed is None
    result, fake = search(profile)
    assert result.plan.rules == search(profiles(trials=6))[0].plan.rules
    assert len(fake.calls) < 140
    assert storage not in json.dumps(result.plan.to_dict())
    again, fake = search(profile)
    assert fake.calls == []
    assert again.plan == result.plan


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("nowhere", "neither a journal file"),
        ("sqlite:////nonexistent/folder/s.db", "cannot use the study storage"),
        ("nosuchdb://user:secret@host/x", "cannot use the study storage nosuchdb://host/x"),
        ("/proc/nothing/s.journal", "cannot use the study storage"),
    ],
)
def test_storage_that_is_not_there(search: Search, profiles: Profiles, storage: str, message: str) -> None:
    from moacompress.core.errors import MoaCompressError

    with pytest.raises(MoaCompressError, match=message) as error:
        search(profiles(storage=storage))
    assert "secret" not in str(error.value)


def test_garbage_in_the_journal(search: Search, profiles: Profiles, tmp_path: Path) -> None:
    path = tmp_path / "s.journal"
    path.write_text("not json\nnor this\n")
    with pytest.raises(ArtefactError, match="cannot use the study storage"):
        search(profiles(storage=str(path)))


def test_a_study_of_another_profile_is_refused(search: Search, profiles: Profiles, tmp_path: Path) -> None:
    storage = str(tmp_path / "s.journal")
    result, _ = search(profiles(trials=1, storage=storage))
    backend = optuna.storages.journal.JournalFileBackend(storage)
    name = f"moacompress-{result.plan.provenance['search']}"
    optuna.load_study(storage=optuna.storages.JournalStorage(backend), study_name=name).set_user_attr(
        "profile", "other"
    )
    with pytest.raises(ArtefactError, match="of another profile"):
        search(profiles(trials=1, storage=storage))


def test_what_is_at_the_output_already(search: Search, profiles: Profiles, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    out.write_text("{}")
    with pytest.raises(ArtefactError, match="is not a plan"):
        search(profiles(trials=2), out=out)
    search(profiles(trials=2), out=out, overwrite=True)
    with pytest.raises(ArtefactError, match="another search"):
        search(profiles(trials=2), "60%", out=out)
    assert Plan.load(out).budget["asked"] == ["50%"]
    search(profiles(trials=2), "60%", out=out, overwrite=True)
    assert Plan.load(out).budget["asked"] == ["60%"]
    with pytest.raises(ArtefactError, match="exists already"):
        search(profiles(trials=2), out=tmp_path, overwrite=True)


def test_bad_requests_fail_before_anything_is_measured(search: Search, profiles: Profiles, tmp_path: Path) -> None:
    profile = profiles()
    with pytest.raises(BudgetError, match="no budget"):
        search(profile, None)
    with pytest.raises(BudgetError, match="bare number"):
        search(profile, "25")
    with pytest.raises(InfeasibleBudgetError, match="at least"):
        search(profile, "1%")
    shape = replace(profile.shape, weights_fingerprint="other")
    other = SimpleNamespace(model=None, source="other", shape=shape, weights_like=lambda given: "other")
    with pytest.raises(ModelError, match="other weights"):
        search(profile, model=other)
    with pytest.raises(ArtefactError, match=r"no profile\.json"):
        find_plan(tmp_path, "25%")


def test_several_budgets_all_hold(search: Search, profiles: Profiles) -> None:
    profile = profiles(trials=2)
    result, _ = search(profile, ["60%", "40%@512"])
    assert result.plan.kv_share(512) <= 0.4
    assert result.plan.kv_share(256) <= 0.6


def test_the_recipes_budget_is_the_default(search: Search, profiles: Profiles) -> None:
    profile = profiles(trials=1)
    result, _ = search(profile, None, recipe=profile.recipe.override(budget=["55%"]))
    assert result.plan.budget["asked"] == ["55%"]


def test_a_better_uniform_window_is_returned_and_said(
    search: Search,
    profiles: Profiles,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fake_objective: Any,
) -> None:
    monkeypatch.setattr(fake_objective, "_cost", lambda self, layer, head, rule: 0.1 if rule in self.index else 0.01)
    with caplog.at_level(logging.WARNING, "moacompress"):
        result, _ = search(profiles(trials=3))
    assert "nothing that was found beats the baseline uniform" in caplog.text
    assert len({rule for row in result.plan.rules for rule in row}) == 1
    assert result.harm["plan"] == result.harm["uniform"] < result.harm["trial0"]


def test_timeout_leaves_the_first_trial(search: Search, profiles: Profiles) -> None:
    result, _ = search(profiles(timeout=1e-6))
    assert result.trials == 1
    assert result.best_trial == 0


def test_hopeless_plans_are_pruned_and_never_win(
    search: Search, profiles: Profiles, fake_objective: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def _keys(fake: Any) -> list[str]:
        return [key for key, _ in fake.calls]

    honest = fake_objective._cost
    monkeypatch.setattr(
        fake_objective, "_cost", lambda self, *where: honest(self, *where) * (1 if len(set(_keys(self))) < 10 else 50)
    )

    profile = profiles(trials=8, ablations=0)
    result, fake = search(profile)
    counts = {key: _keys(fake).count(key) for key in _keys(fake)}
    seen = [count for count in counts.values() if count < fake.size]
    assert seen, "a plan 50 times worse is not measured on all samples"
    assert counts[result.plan.key()] == fake.size


def test_progress_tells_the_best_so_far(search: Search, profiles: Profiles) -> None:
    class Record(Progress):
        def __init__(self) -> None:
            self.log: list[Any] = []

        def start(self, what: str, total: int) -> None:
            self.log.append((what, total))

        def step(self, note: str = "") -> None:
            self.log.append(note)

    record = Record()
    search(profiles(trials=3), progress=record)
    assert ("calibrating", 3) in record.log
    assert ("searching", 3) in record.log
    assert "best" in record.log[-1]
    assert any(family in record.log[-1] for family in FAMILIES)


@pytest.mark.parametrize("solver", ["milp", "lagrange"])
def test_both_solvers_and_estimators(search: Search, profiles: Profiles, solver: str) -> None:
    profile = profiles(trials=2, solver=solver)
    result, _ = search(profile, recipe=profile.recipe.override(profile__estimator="sample"))
    assert result.plan.kv_share(512) <= 0.5


def test_rounds_and_moves_only_ever_help(search: Search, profiles: Profiles, tmp_path: Path) -> None:
    one_shot = search(profiles(trials=1))[0]
    out = tmp_path / "plan.json"
    improved, fake = search(profiles(trials=1, rounds=3, moves=4), out=out)
    assert improved.harm["trial0"] == one_shot.harm["plan"]
    assert improved.harm["plan"] < one_shot.harm["plan"]  # around the plan the stand-in knows the truth
    assert improved.harm["plan"] == pytest.approx(np.mean(_harms(fake, improved.plan)))
    for n in fake.profile.lengths:
        assert improved.plan.kv_bytes(n) <= fake.profile.shape.dense_kv_bytes(n) // 2
    stages = improved.explanation["stages"]
    assert [stage["name"].partition(",")[0] for stage in stages][:3] == ["surrogate", "study", "round 1"]
    kept = [stage for stage in stages if stage["kept"]]
    assert [stage["log_ratio"] for stage in kept[1:]] == sorted(
        (stage["log_ratio"] for stage in kept[1:]), reverse=True
    )
    assert improved.plan.provenance["stage"].startswith(("round", "moves", "rest"))
    again, fake = search(profiles(trials=1, rounds=3, moves=4), out=out)
    assert fake.calls == []
    assert again.explanation == improved.explanation == json.loads((tmp_path / "plan.explain.json").read_text())


def test_a_round_measures_so_many_plans_and_its_own_never(search: Search, profiles: Profiles) -> None:
    first, fake = search(profiles(layers=24, trials=1, alternatives=False))
    asked = {}
    for count in (1, 8):
        result, fake = search(profiles(layers=24, trials=1, alternatives=False, rounds=1, round_trials=count))
        calls = [key for key, _ in fake.calls]
        assert calls.count(first.plan.key()) <= fake.size  # as trial 0 of the study, not again in the round
        names = [stage["name"] for stage in result.explanation["stages"]]
        assert sum(name.startswith("round") for name in names) == 1
        asked[count] = len(set(calls))
    assert asked[1] < asked[8] <= asked[1] + 7


def test_rounds_that_do_not_help_are_not_taken(
    search: Search, profiles: Profiles, fake_objective: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = fake_objective.around

    def wrong(self: Any, *arguments: Any) -> Any:
        form = honest(self, *arguments)(0.0)
        return lambda relative: replace(form, linear=-form.linear)

    monkeypatch.setattr(fake_objective, "around", wrong)
    one_shot = search(profiles(trials=1))[0]
    misled = search(profiles(trials=1, rounds=3))[0]
    assert misled.plan.rules == one_shot.plan.rules
    assert not any(stage["kept"] for stage in misled.explanation["stages"] if stage["name"].startswith("round"))


def test_what_is_left_is_spent_unless_that_measures_worse(
    search: Search, profiles: Profiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the solver is held to the narrowest rule of all KV heads."""

    def shares(plan: Plan) -> list[float]:
        return [plan.kv_share(n) for n in (256, 512)]

    monkeypatch.setattr(Knapsack, "choose", lambda self, costs: np.ones(costs.shape[:2], np.int64))
    spent = search(profiles(trials=1, alternatives=False))[0]
    stages = spent.explanation["stages"]
    assert [stage["name"] for stage in stages] == ["surrogate", "study", "rest"]
    assert stages[-1]["kept"]
    assert max(shares(spent.plan)) > 0.45
    measured = study.Search._measured

    def worse(self: Any, stage: str, *rest: Any) -> Any:
        found = measured(self, stage, *rest)
        return replace(found, harms=[100 * harm for harm in found.harms]) if stage == "rest" else found

    monkeypatch.setattr(study.Search, "_measured", worse)
    left = search(profiles(trials=1, alternatives=False))[0]
    assert not left.explanation["stages"][-1]["kept"]
    assert max(shares(left.plan)) < max(shares(spent.plan))


def test_rounds_and_moves_killed_at_any_point(search: Search, profiles: Profiles, tmp_path: Path) -> None:
    def settings() -> Profile:
        return profiles(trials=2, rounds=2, moves=3)

    whole, _ = search(settings(), out=tmp_path / "whole.json")
    result, runs, out = None, 0, tmp_path / "plan.json"
    while result is None:
        runs += 1
        result, _ = search(settings(), out=out, dies_at=23)
    assert runs > 3
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert result.explanation == whole.explanation


def test_timeout_stops_rounds_and_moves_and_the_same_call_goes_on(
    search: Search, profiles: Profiles, tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    first, _ = search(profiles(trials=1, rounds=2, moves=2, timeout=1e-6), out=out)
    assert not any(stage["name"].startswith(("round", "moves")) for stage in first.explanation["stages"])
    assert first.plan.provenance["finished"] is False
    second, _ = search(profiles(trials=1, rounds=2, moves=2), out=out)
    assert second.harm["plan"] < first.harm["plan"]


def test_a_run_that_stops_sooner_takes_nothing_back(search: Search, profiles: Profiles, tmp_path: Path) -> None:
    out, harms, stage = tmp_path / "plan.json", [], ""
    while not stage.startswith("round"):
        result, _ = search(profiles(trials=1, rounds=3, moves=2), out=out, dies_at=13)
        assert result is None
        if out.exists():
            found = Plan.load(out)
            stage = found.provenance["stage"]
            harms.append(found.quality["measured_harm"]["plan"])
    stopped, _ = search(profiles(trials=1, rounds=3, moves=2, timeout=1e-6), out=out)
    assert stopped.harm["plan"] == harms[-1] < harms[0]
    assert stopped.plan.provenance["stage"] == stage
    assert stopped.plan.provenance["finished"] is False
    more, _ = search(profiles(trials=3, rounds=3, moves=2, timeout=1e-6), out=out)
    assert more.harm["plan"] <= harms[-1]


def test_the_last_step_of_a_whole_search_stands(
    search: Search, profiles: Profiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of the budget is spent also where that measures a little worse; the round's plan is on disk by then."""
    monkeypatch.setattr(
        study.Search, "_rest", lambda self, tried, best: replace(best, value=best.value + 0.01, stage="rest")
    )
    found, _ = search(profiles(trials=1, rounds=1), out=tmp_path / "plan.json")
    assert any(stage["kept"] for stage in found.explanation["stages"] if stage["name"].startswith("round"))
    assert found.plan.provenance["stage"] == "rest"


def test_starts_are_tried_first(search: Search, profiles: Profiles) -> None:
    knobs = dict.fromkeys(search(profiles(trials=1))[0].plan.provenance["knobs"], 0.5)
    found = search(profiles(trials=2), starts=[knobs])[0]
    other = search(profiles(trials=2))[0]
    assert found.plan.provenance["search"] != other.plan.provenance["search"]
    bent, sampled = (result.explanation["predicted"]["pairs"] for result in (found, other))
    assert bent[0] == sampled[0]
    assert bent[1:] != sampled[1:]


def test_the_explanation_says_which_heads_and_why(search: Search, profiles: Profiles) -> None:
    result, fake = search(profiles(trials=14))
    told = result.explanation
    rows = told["heads"]
    shape = fake.profile.shape
    assert len(rows) == shape.layers * shape.kv_heads
    saves = [row["saves"] for row in rows]
    assert saves == sorted(saves, reverse=True)
    for row in rows[:4]:
        rule = result.plan.rules[row["layer"]][row["kv_head"]]
        assert row["rule"] == (
            "full" if rule.is_full else {"sink": rule.sink, "alpha": rule.alpha, "beta_q": rule.beta_q}
        )
        assert row["kept"] == rule.kept(512, 32, shape.native_windows[row["layer"]])
    assert saves[0] > 0
    assert sum(told["knobs"].values()) == pytest.approx(1.0)
    assert told["predicted"]["spearman"] <= 1
    assert told["harm"] == result.harm


def test_a_floor_keeps_a_layer(search: Search, profiles: Profiles) -> None:
    found = search(profiles(trials=1, floors={0: 1.0, 2: 0.5}), "60%")[0]
    assert all(rule.is_full for rule in found.plan.rules[0])
    for n in (256, 512):
        assert all(rule.slots(n, 32) >= n // 2 for rule in found.plan.rules[2])
    with pytest.raises(InfeasibleBudgetError, match="at least"):
        search(profiles(trials=1, floors={0: 1.0, 1: 1.0, 2: 1.0}), "20%")
    with pytest.raises(BudgetError, match="a floor is asked for in layer 9"):
        search(profiles(trials=1, floors={9: 0.5}))
