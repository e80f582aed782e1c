from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest

from moacompress.calibration.store import Profile
from moacompress.core.artefact_names import of_search
from moacompress.core.errors import ArtefactError, BudgetError, InfeasibleBudgetError, ModelError
from moacompress.core.files import remove
from moacompress.core.progress import Progress
from moacompress.rules.plan import Plan
from moacompress.search import ledger, study
from moacompress.search.alternatives import CANDIDATES
from moacompress.search.baselines import FAMILIES, family_plans
from moacompress.search.knapsack import Knapsack
from moacompress.search.ledger import own_study
from moacompress.search.search_context import SearchContext
from moacompress.search.standing import Standing
from moacompress.search.study import find_plan

Profiles = Callable[..., Profile]
Search = Callable[..., tuple[Any, Any]]
Measuring = Callable[..., AbstractContextManager[subprocess.Popen[str]]]

HERE = Path(__file__).resolve().parent


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


KILLED = """
opened_search.Objective = lambda model, samples: fakes.FakeObjective(profile, int(sys.argv[3]), kills=True)
find_plan(profile, "50%", out=sys.argv[2], model=source)
"""


def test_sigkill_and_again(search: Search, search_script: str, tmp_path: Path) -> None:
    whole, fake = search(out=tmp_path / "whole.json")
    out = tmp_path / "plan.json"
    half = len(fake.calls) // 2 + 20
    command = [sys.executable, "-c", search_script + KILLED, str(HERE / "conftest.py"), str(out), str(half)]
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


@pytest.mark.parametrize("budget", ["50%", "60%"], ids=["the same search", "another search"])
def test_overwrite_starts_anew_and_leaves_what_is_not_of_the_search(
    search: Search, profiles: Profiles, tmp_path: Path, budget: str
) -> None:
    out, profile = tmp_path / "plan.json", profiles(trials=2)
    _, fresh = search(profile, budget, out=tmp_path / "whole" / "plan.json")
    search(profile, out=out)
    for name in ("plan.baselines/old.json", "plan.rounds/key/samples/00000.safetensors", "plan.scouts/99.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("of before")
    (tmp_path / ".plan.json.abcdefgh.tmp").write_text("half a pl")
    (tmp_path / "plan.study.journal.lock").write_text("")
    own = ("plan.txt", "plan.notes.json", "plan-25.json", "plan.study.journal.copy", "other.study.journal")
    for name in own:
        (tmp_path / name).write_text("mine")
    made = {path.name for path in of_search(out)}
    with ExitStack() as held:  # an open file keeps its inode from being given to another
        files = [path for path in tmp_path.rglob("*") if path.is_file() and path.relative_to(tmp_path).parts[0] in made]
        before = {os.fstat(held.enter_context(path.open()).fileno()).st_ino for path in files}
        _, fake = search(profile, budget, out=out, overwrite=True)
        assert not before & {path.stat().st_ino for path in tmp_path.rglob("*")}
    assert fake.calls == fresh.calls
    assert out.read_bytes() == (tmp_path / "whole" / "plan.json").read_bytes()
    left = {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*")}
    assert left <= {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    assert {path.name for path in tmp_path.iterdir()} == {*own, "whole", *(path.parts[0] for path in left)}
    assert all((tmp_path / name).read_text() == "mine" for name in own)


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_overwrite_forgets_the_study_in_a_storage_and_no_other(
    search: Search, profiles: Profiles, tmp_path: Path, kind: str
) -> None:
    storage = f"sqlite:///{tmp_path}/s.db" if kind == "sqlite" else str(tmp_path / "s.log")
    profile = profiles(trials=2, rounds=1, storage=storage)
    _, first = search(profile, out=tmp_path / "plan.json")
    _, other = search(profile, "60%", out=tmp_path / "other.json")
    _, again = search(profile, out=tmp_path / "plan.json", overwrite=True)
    assert again.calls == first.calls
    _, kept = search(profile, "60%", out=tmp_path / "copy.json")
    assert kept.calls == []
    assert other.calls


def test_an_overwrite_that_is_interrupted_is_recovered_from(
    search: Search, profiles: Profiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after every removal in turn, the same command starts anew, and without the flag the same search goes on."""
    profile = profiles(trials=1)
    whole, fresh = search(profile, out=tmp_path / "plan.json")

    for stop in range(len(of_search(tmp_path))):

        def removing(paths: list[Path], stop: int = stop) -> None:
            remove(paths[:stop])
            raise KeyboardInterrupt

        for overwrite in (True, False):
            with monkeypatch.context() as patched:
                patched.setattr(study, "remove", removing)
                assert search(profile, out=tmp_path / "plan.json", overwrite=True)[0] is None
            result, fake = search(profile, out=tmp_path / "plan.json", overwrite=overwrite)
            assert result.plan == whole.plan
            assert not overwrite or fake.calls == fresh.calls


HOLDING = """
class Holding(fakes.FakeObjective):
    held = False
    def under(self, plan):
        if len(self.calls) > 60 and not self.held:
            self.held = True
            print("measuring", flush=True)
            sys.stdin.readline()
        return super().under(plan)
opened_search.Objective = lambda model, samples: Holding(profile)
storage = sys.argv[3] or None
find_plan(profile, "50%", out=sys.argv[2], model=source, recipe=profile.recipe.override(search__storage=storage))
"""


@pytest.fixture
def measuring(search_script: str) -> Measuring:
    """Runs a search in a process of its own, which is in the middle of measuring and waits for a line."""

    @contextmanager
    def run(out: Path, storage: str = "") -> Iterator[subprocess.Popen[str]]:
        command = [sys.executable, "-c", search_script + HOLDING, str(HERE / "conftest.py"), str(out), storage]
        with subprocess.Popen(
            command, cwd=HERE.parent.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "measuring\n"
                yield process
            finally:
                process.kill()

    return run


def test_a_second_search_is_refused_while_the_first_lives(
    search: Search, profiles: Profiles, measuring: Measuring, tmp_path: Path
) -> None:
    whole, _ = search(out=tmp_path / "whole.json")
    out = tmp_path / "plan.json"
    with measuring(out) as process:
        for overwrite in (False, True):
            with pytest.raises(ArtefactError, match=rf"plan.json is in use: process {process.pid} on .* another file"):
                search(out=out, overwrite=overwrite)
        storage = str(tmp_path / "plan.study.journal")
        recipe = profiles().recipe.override(search__storage=storage)
        with pytest.raises(
            ArtefactError, match=rf"the study .* in .*plan.study.journal is in use: process {process.pid} "
        ):
            search(out=tmp_path / "other.json", recipe=recipe)
        search(None, "60%", out=tmp_path / "other.json", recipe=recipe)  # another study in the same journal
        process.communicate("go on\n")
        assert process.returncode == 0
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    name = f"moacompress-{whole.plan.provenance['search']}"
    journal = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
    states = {trial.state.name for trial in optuna.load_study(storage=journal, study_name=name).trials}
    assert states == {"COMPLETE"}
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".owner"] == []


@pytest.mark.parametrize("kind", ["beside", "journal", "sqlite"])
def test_a_killed_search_is_taken_over(
    search: Search, profiles: Profiles, measuring: Measuring, tmp_path: Path, kind: str
) -> None:
    storage = {"beside": "", "journal": str(tmp_path / "s.log"), "sqlite": f"sqlite:///{tmp_path}/s.db"}[kind]
    profile = profiles(storage=storage or None)
    whole, fake = search(out=tmp_path / "whole.json")
    with measuring(tmp_path / "plan.json", storage) as process:
        if storage:
            with pytest.raises(
                ArtefactError, match=rf"the study .* is in use: process {process.pid} .* with --storage"
            ):
                search(profile, out=tmp_path / "other.json")
        process.kill()
    result, rest = search(profile, out=tmp_path / "plan.json")
    assert result.plan.rules == whole.plan.rules
    assert len(rest.calls) <= len(fake.calls) - 60
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".owner"] == []


def test_owners_that_killed_searches_left_in_a_journal_go(
    search: Search, profiles: Profiles, measuring: Measuring, tmp_path: Path
) -> None:
    with measuring(tmp_path / "plan.json") as process:
        process.kill()
    assert len([path for path in tmp_path.iterdir() if path.suffix == ".owner"]) == 2
    search(profiles(trials=1), "60%", out=tmp_path / "plan.json", overwrite=True)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".owner"] == []


@pytest.mark.parametrize("kind", ["beside", "journal", "sqlite"])
def test_a_second_search_in_the_same_process_is_refused(
    search: Search, profiles: Profiles, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, fake_objective: Any
) -> None:
    storage = {"beside": None, "journal": str(tmp_path / "s.log"), "sqlite": f"sqlite:///{tmp_path}/s.db"}[kind]
    profile = profiles(trials=1, storage=storage)
    seconds: list[Future[Any]] = []
    honest = fake_objective.under

    def under(self: Any, plan: Plan) -> Any:
        if not seconds:
            out = tmp_path / ("plan.json" if storage is None else "other.json")
            with ThreadPoolExecutor(1) as pool:
                seconds.append(pool.submit(find_plan, profile, "50%", out=out, model=source))
        return honest(self, plan)

    source: Any = SimpleNamespace(model=None, source="model", shape=profile.shape)
    monkeypatch.setattr(fake_objective, "under", under)
    search(profile, out=tmp_path / "plan.json")
    with pytest.raises(ArtefactError, match=f"is in use: process {os.getpid()} on"):
        seconds[0].result()


def test_an_owner_in_a_database_is_heard_of_and_leaves_its_successor_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = f"sqlite:///{tmp_path}/s.db"
    beats: list[Callable[[], None]] = []

    @contextmanager
    def heard_of(beat: Callable[[], None]) -> Iterator[None]:
        beats.append(beat)
        yield

    monkeypatch.setattr(ledger, "heard_of", heard_of)

    def attribute() -> Any:
        return optuna.load_study(study_name="moacompress-x", storage=storage).user_attrs["owner"]

    with own_study(storage, "moacompress-x"):
        begun = attribute()
        beats[0]()
        assert attribute()["heard"] > begun["heard"]
        other = {**begun, "token": "theirs", "host": "elsewhere"}
        optuna.load_study(study_name="moacompress-x", storage=storage).set_user_attr("owner", other)
        beats[0]()
        assert attribute() == other
        with pytest.raises(ArtefactError, match="on elsewhere has been at work"), own_study(storage, "moacompress-x"):
            pass
    assert attribute() == other
    stale = {**other, "heard": other["heard"] - 1000}
    optuna.load_study(study_name="moacompress-x", storage=storage).set_user_attr("owner", stale)
    with own_study(storage, "moacompress-x"):
        assert attribute()["token"] != "theirs"
    assert attribute() is None


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
    measured = SearchContext.measured

    def worse(self: SearchContext, standing: Standing, plan: Plan, stage: str) -> Standing:
        found = measured(self, standing, plan, stage)
        return replace(found, harms=[100 * harm for harm in found.harms]) if stage == "rest" else found

    monkeypatch.setattr(SearchContext, "measured", worse)
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

    def worse(standing: Standing, context: SearchContext) -> Standing:
        return replace(standing, value=standing.value + 0.01, stage="rest")

    monkeypatch.setattr(study, "STEPS", (*study.STEPS[:-1], worse))
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
        assert row["rule"] == ("full" if rule.is_full else asdict(rule))
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
