"""Many workers of one search: they share what is measured, take over from those that are killed, and find one plan."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from moacompress.calibration.profile.store import Profile
from moacompress.core.errors import ArtefactError, InUseError
from moacompress.core.lock_holders import LockHolder, held, own_file
from moacompress.rules.budget import split_budgets
from moacompress.rules.loss import Loss
from moacompress.rules.plan import Plan
from moacompress.search.measure import claims as claims_module
from moacompress.search.measure.claims import CLAIMS, WORKER, ClaimLost, Claims, open_claims
from moacompress.search.measure.storages import guarded, open_storage, quiet_optuna, shown
from moacompress.search.plan_sets import find_plans, find_smallest
from moacompress.search.search_status import search_status
from tests.search.conftest import Search, make_profile
from tests.search_workers import FORK, SearchRun, check_nothing_is_lost_or_doubled, killed_at_random


def storage_in(folder: Path, kind: str) -> str:
    return f"sqlite:///{folder}/s.db" if kind == "sqlite" else str(folder / "s.journal")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., SearchRun]:
    def make(kind: str, **settings: Any) -> SearchRun:
        profile = make_profile(**{"samples": 4, "trials": 5, **settings})
        return SearchRun(profile, storage_in(tmp_path, kind), tmp_path, tmp_path / "plan.json")

    return make


def test_workers_find_what_one_alone_finds(run: Callable[..., SearchRun], search: Search, tmp_path: Path) -> None:
    shared = run("journal", samples=12)  # of trial 0 there is a part for each
    alone, fake = search(shared.profile, out=tmp_path / "alone.json")
    shared.barrier = FORK.Barrier(3)
    for _ in range(3):
        shared.start()
    assert shared.wait() == [0] * 3, shared.errors()
    results = shared.results()
    assert [result["written"] for result in results].count(True) == 1
    assert {result["path"] for result in results} == {str(shared.out)}
    assert shared.out.read_bytes() == (tmp_path / "alone.json").read_bytes()
    assert all(Plan.from_dict(result["plan"]) == alone.plan for result in results)
    check_nothing_is_lost_or_doubled(shared)
    assert shared.measured().total() == shared.kept()[0].total() >= len(fake.calls)
    assert len({line.split()[0] for line in (tmp_path / "measured.txt").read_text().splitlines()}) == 3
    again, fake = search(shared.profile, recipe=shared.recipe, out=tmp_path / "again.json")
    assert fake.calls == []
    assert again.plan == alone.plan


def test_what_killed_workers_had_is_taken_over(run: Callable[..., SearchRun], search: Search, tmp_path: Path) -> None:
    """In SQLite; in a journal `test_kills` does it, and `make test-services` in all of them."""
    shared = run("sqlite")
    search(shared.profile, out=tmp_path / "alone.json")
    killed_at_random(shared, seed=0)
    assert shared.killed
    assert shared.out.read_bytes() == (tmp_path / "alone.json").read_bytes()
    check_nothing_is_lost_or_doubled(shared)


def two_budgets(profile: Profile, **options: Any) -> Any:
    return find_plans(profile, split_budgets(["50%,25%"]), **options)


def the_smallest(profile: Profile, **options: Any) -> Any:
    return find_smallest(profile, Loss.parse("20%"), **options)


@pytest.mark.parametrize(
    ("find", "at_once"), [(two_budgets, True), pytest.param(the_smallest, False, marks=pytest.mark.heavy)]
)
def test_workers_share_several_searches(
    find: Callable[..., Any], at_once: bool, run: Callable[..., SearchRun], tmp_path: Path
) -> None:
    """Several budgets, the smallest budget for a loss: as one worker alone, and nothing measured or written twice."""
    shared = run("journal", trials=4, samples=5)
    (tmp_path / "alone").mkdir()
    alone = SearchRun(
        shared.profile, str(tmp_path / "alone.journal"), tmp_path / "alone", tmp_path / "alone" / "plan.json"
    )
    shared.find = alone.find = find
    alone.start()
    assert alone.wait() == [0], alone.errors()
    shared.barrier = FORK.Barrier(2) if at_once else None  # the searches of the smallest begin with a single trial
    for _ in range(2):
        shared.start()
    assert shared.wait() == [0, 0], shared.errors()
    written = [Path(result["path"]) for result in shared.results() if result["written"]]
    assert sorted(path.name for path in written) == sorted(Path(result["path"]).name for result in alone.results())
    for path in written:
        assert path.read_bytes() == (tmp_path / "alone" / path.name).read_bytes()
    assert shared.measured() == alone.measured()
    measured = (tmp_path / "measured.txt").read_text().splitlines()
    assert len({line.split()[0] for line in measured}) == 2 or not at_once
    before = [path.stat().st_ino for path in written]
    shared.barrier = None
    shared.start()  # a worker that comes after all is written
    assert shared.wait() == [0, 0, 0], shared.errors()
    assert [path.stat().st_ino for path in written] == before
    assert sum(result["written"] for result in shared.results()) == len(written)


def test_a_worker_whose_time_is_up_writes_no_front_over_anothers(run: Callable[..., SearchRun], tmp_path: Path) -> None:
    """The lock holder is at work still: this process."""
    shared = run("journal", trials=4, samples=5)
    shared.find = two_budgets
    front = tmp_path / "plan.front.json"
    with own_file(front):
        front.write_text("the lock holder's")
        shared.profile = replace(shared.profile, recipe=shared.profile.recipe.override(search__timeout=0.5))
        shared.seconds = 0.02
        shared.start()
        shared.wait()
        assert front.read_text() == "the lock holder's"


def test_numbers_are_kept_every_few_seconds_and_where_a_claim_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(claims_module, "time", SimpleNamespace(monotonic=lambda: clock[0], time=time.time))
    with quiet_optuna(), open_claims(None, "s", alone=False) as claims:

        def kept() -> list[Any]:
            claimed = [trial for trial in claims.trials() if trial.user_attrs["name"] == "x"]
            return [trial.user_attrs.get("numbers") for trial in claimed]

        claim = claims.acquire("x")
        assert claim is not None
        claims.add_number(claim, 1.0)
        assert kept() == [None]
        clock[0] += claims_module.KEEP_SECONDS
        claims.add_number(claim, 2.0)
        assert kept() == [[1.0, 2.0]]
        claims.add_number(claim, 3.0)
        assert kept() == [[1.0, 2.0]]
        claims.release(claim)
        assert kept() == [[1.0, 2.0, 3.0]]
        again = claims.acquire("x")
        assert again is not None
        assert again.numbers == [1.0, 2.0, 3.0]
        claims.add_number(again, 4.0)
        claims.finish(again, "done")
        assert claims.result("x") == "done"
        assert claims.acquire("x") is None


def elsewhere(storage: str, heard: float) -> tuple[Any, int]:
    """Leaves a worker of another boot, or machine, in a study, and what it has claimed; returns the storage and the claim."""
    holder = LockHolder("elsewhere", "another boot", "", 7, "1", time.time() - 86400, "its token").to_dict()
    notes: list[dict[str, Any]] = [{"name": f"{WORKER}its token", "trials": 5, "heard": heard}, {"name": "claimed"}]
    with quiet_optuna():
        backend = open_storage(storage)
        study = optuna.create_study(storage=backend, study_name="s" + CLAIMS, load_if_exists=True)
        study_id = backend.get_study_id_from_name(study.study_name)
        running = optuna.trial.TrialState.RUNNING
        made = [optuna.trial.create_trial(state=running, user_attrs={"holder": holder, **one}) for one in notes]
        return backend, [backend.create_new_trial(study_id, trial) for trial in made][1]


def test_a_worker_elsewhere_is_dead_once_its_heartbeat_stops(tmp_path: Path) -> None:
    storage, clock = storage_in(tmp_path, "journal"), SimpleNamespace(now=0.0)
    backend, claimed = elsewhere(storage, heard=0.0)  # its clock is years behind
    with quiet_optuna():
        study = backend.get_study_id_from_name("s" + CLAIMS)
        claims = Claims(backend, study, "here", monotonic=lambda: clock.now)
        for clock.now in (0.0, 299.0):
            assert claims.acquire("claimed") is None
        backend.set_trial_user_attr(claimed - 1, "heard", 1.0)
        for clock.now in (310.0, 605.0):
            assert claims.acquire("claimed") is None
        clock.now = 611.0
        assert claims.acquire("claimed") is not None
        assert backend.get_trial(claimed).state.name == "FAIL"


def test_a_worker_that_was_taken_for_dead_loses_its_claim() -> None:
    """It stalled for longer than `SILENT_SECONDS`; what it kept until then is not measured again."""
    with quiet_optuna(), open_claims(None, "s", alone=False) as watching:
        stalled = LockHolder("elsewhere", "another boot", "", 7, "1", 0.0, "its token")
        claims = Claims(watching.storage, watching.study_id, "here", holder=stalled)
        lost = claims.acquire("x")
        assert lost is not None
        claims.note(lost, numbers=[1.0])
        clock = SimpleNamespace(now=0.0)
        other = Claims(watching.storage, watching.study_id, "here", monotonic=lambda: clock.now)
        with held(other.holder):
            assert other.acquire_first(["x"]) is None
            clock.now = 400.0
            taken = other.acquire_first(["x"])
            assert taken is not None
            assert taken.numbers == [1.0]
            with pytest.raises(ClaimLost):
                claims.finish(lost, "late")
            assert claims.acquire("x") is None
            other.finish(taken, "once")
        assert claims.result("x") == "once"


def test_what_a_worker_that_has_left_had_claimed_is_free(tmp_path: Path) -> None:
    """Its process may live on; and whoever has the plan's lock knows that the one before has gone."""
    for way in ("left", "alone"):
        storage = storage_in(tmp_path / way, "journal")
        backend, claimed = elsewhere(storage, time.time())
        with quiet_optuna(), open_claims(storage, "s", alone=way == "alone") as claims:
            if way == "left":
                assert claims.acquire("claimed") is None
                backend.set_trial_state_values(claimed - 1, optuna.trial.TrialState.COMPLETE, [0.0])
            assert claims.acquire("claimed") is not None
        assert backend.get_trial(claimed).state.name == "FAIL"


def test_a_claim_is_its_living_workers_until_it_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = storage_in(tmp_path, "journal")
    with quiet_optuna(), open_claims(storage, "s", alone=False) as claims:
        claim = claims.acquire("x")
        assert claim is not None
        assert claims.acquire("x") is None
        with open_claims(storage, "s", alone=True) as beside:
            assert beside.acquire("x") is None
        with monkeypatch.context() as broken:  # also where the storage was not told
            broken.setattr(claims.storage, "set_trial_state_values", lambda *arguments: 1 / 0)
            claims.release(claim)
        assert claims.acquire("x") is not None


def test_nothing_begins_from_scratch_beside_a_worker_that_is_heard_of(tmp_path: Path) -> None:
    storage = storage_in(tmp_path, "sqlite")
    backend, worker = elsewhere(storage, time.time() - 200)
    with (
        quiet_optuna(),
        pytest.raises(InUseError, match="process 7 on elsewhere has been at work on it for 1 day.* try again in 5 min"),
        open_claims(storage, "s", alone=False, from_scratch=True),
    ):
        pass
    with quiet_optuna():
        with open_claims(storage, "s", alone=False) as beside:
            assert beside.acquire("claimed") is None
        backend.set_trial_user_attr(worker - 1, "heard", time.time() - 400)
        with open_claims(storage, "s", alone=False, from_scratch=True) as claims:
            assert [trial.user_attrs["name"] for trial in claims.trials()] == [WORKER + claims.holder.token]


def test_optunas_own_tools_see_the_finished_trials(search: Search, tmp_path: Path) -> None:
    result, _ = search(make_profile(), out=tmp_path / "plan.json")
    name = f"moacompress-{result.plan.provenance['search']}"
    with quiet_optuna():
        study = optuna.load_study(study_name=name, storage=open_storage(str(tmp_path / "plan.study.journal")))
    assert [trial.user_attrs["index"] for trial in study.trials] == list(range(result.trials))
    assert {trial.state.name for trial in study.trials} == {"COMPLETE"}
    assert study.trials[0].value == 0.0
    assert set(study.best_trial.params) == set(study.trials[0].params) != set()
    assert all(trial.duration is not None and trial.duration.total_seconds() >= 0 for trial in study.trials)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg2://me:s3cr@t:x@db.example:5432/moa",
        "postgresql://db.example/moa?user=me&password=s3cret",
        "mysql://me:s3/cr@db.example",
    ],
)
def test_a_password_is_neither_shown_nor_kept(url: str) -> None:
    from moacompress.cli.harness import resumes_with

    recipe = make_profile().recipe.override(search__storage=url)
    assert recipe.search.storage == url
    texts = [
        json.dumps(recipe.resolved()),
        json.dumps(recipe.shared("model")),
        resumes_with(["moacompress", "search", "--storage", url], overwrite=False),
        shown(url),
    ]
    assert all("s3" not in text and "x@db" not in text for text in texts)
    assert all("db.example" in text for text in (texts[0], texts[3]))
    with pytest.raises(ArtefactError) as refused, guarded(shown(url)):
        raise ValueError(f"no such host in '{url}'")
    assert "s3" not in str(refused.value)


def test_a_driver_that_lacks_is_named_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(
        ArtefactError, match=r"driver psycopg is not installed; pip install 'moacompress\[postgresql\]'"
    ):
        open_storage("postgresql://me@host/db")


def test_status_says_who_is_alive_and_what_is_done(run: Callable[..., SearchRun], tmp_path: Path) -> None:
    shared = run("sqlite", samples=8)  # of trial 0 there is a part for each
    with pytest.raises(ArtefactError, match="there is no study storage"):
        search_status(shared.storage)
    assert [path.name for path in tmp_path.iterdir()] == []
    shared.barrier = FORK.Barrier(3)  # the two wait for a third one
    first, second = shared.start(), shared.start()
    while shared.barrier.n_waiting < 2:
        time.sleep(0.05)
    shared.kill(second)
    (begun,) = search_status(shared.storage)
    assert [(worker.pid, worker.state) for worker in begun.workers] in (
        [(first.pid, "alive"), (second.pid, "dead")],
        [(second.pid, "dead"), (first.pid, "alive")],
    )
    assert begun.trials == {"done": 0, "running": 0, "failed": 0, "wanted": 5}
    failed = begun.measurements["failed"]  # a claim that was another's by a moment is one, too
    assert begun.measurements == {"done": 0, "running": 1, "failed": failed}
    assert failed in (1, 2)
    assert (begun.best_kl, begun.seconds_left) == (None, None)
    shared.kill(first)
    shared.barrier = None
    shared.start()
    shared.wait()
    (done,) = search_status(shared.storage)
    assert [worker.state for worker in done.workers] == ["dead", "dead", "ended"]
    assert {**done.trials, "failed": 0} == {"done": 5, "running": 0, "failed": 0, "wanted": 5}
    measured = shared.results()[0]["plan"]["quality"]["measured_harm"]
    assert done.best_kl is not None
    assert measured["plan"] <= done.best_kl <= measured["trial0"]
    assert "5 of 5 done" in "\n".join(done.lines())
    assert json.loads(json.dumps(done.to_dict()))["trials"]["done"] == 5
