"""A search without a storage of its own never works beside another one; what a killed one owned is taken over."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from moacompress.calibration.profile.store import Profile
from moacompress.core.errors import ArtefactError, InUseError
from moacompress.rules.plan import Plan
from moacompress.search.study import find_plan

Profiles = Callable[..., Profile]
Search = Callable[..., tuple[Any, Any]]
Measuring = Callable[..., AbstractContextManager[subprocess.Popen[str]]]

HERE = Path(__file__).resolve().parent


HOLDING = """
class Holding(fakes.FakeObjective):
    held = False
    def under(self, plan):
        if len(self.calls) > 60 and not self.held:
            self.held = True
            print("measuring", flush=True)
            sys.stdin.readline()
        return super().under(plan)
study.Objective = lambda model, samples, *weights: Holding(profile)
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
        search(None, "60%", out=tmp_path / "other.json", recipe=recipe)  # another study in the same journal
        process.communicate("go on\n")
        assert process.returncode == 0
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    name = f"moacompress-{whole.plan.provenance['search']}"
    journal = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
    states = {trial.state.name for trial in optuna.load_study(storage=journal, study_name=name).trials}
    assert states == {"COMPLETE"}
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".owner"] == []


@pytest.mark.parametrize("kind", [pytest.param("beside", marks=pytest.mark.heavy), "sqlite"])
def test_a_killed_search_is_taken_over(
    search: Search, profiles: Profiles, measuring: Measuring, tmp_path: Path, kind: str
) -> None:
    storage = {"beside": "", "sqlite": f"sqlite:///{tmp_path}/s.db"}[kind]
    profile = profiles(storage=storage or None)
    whole, fake = search(out=tmp_path / "whole.json")
    with measuring(tmp_path / "plan.json", storage) as process:
        if storage:
            with pytest.raises(ArtefactError, match=rf"is in use: process {process.pid} .* leave out --overwrite"):
                search(profile, out=tmp_path / "other.json", overwrite=True)
        process.kill()
    result, rest = search(profile, out=tmp_path / "plan.json")
    assert result.plan.rules == whole.plan.rules
    assert len(rest.calls) <= len(fake.calls) - 60
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".owner"] == []


def test_holders_that_killed_searches_left_in_a_journal_go(
    search: Search, profiles: Profiles, measuring: Measuring, tmp_path: Path
) -> None:
    with measuring(tmp_path / "plan.json") as process:
        process.kill()
    assert len([path for path in tmp_path.iterdir() if path.suffix == ".owner"]) == 1
    search(profiles(trials=1), "60%", out=tmp_path / "plan.json", overwrite=True)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".owner"] == []


def test_a_second_search_in_the_same_process_is_refused(
    search: Search, profiles: Profiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_objective: Any
) -> None:
    profile = profiles(trials=1)
    seconds: list[Future[Any]] = []
    honest = fake_objective.under

    def under(self: Any, plan: Plan) -> Any:
        if not seconds:
            with ThreadPoolExecutor(1) as pool:
                seconds.append(pool.submit(find_plan, profile, "50%", out=tmp_path / "plan.json", model=source))
        return honest(self, plan)

    source: Any = SimpleNamespace(model=None, source="model", shape=profile.shape, computes_in=profile.shape.dtype)
    monkeypatch.setattr(fake_objective, "under", under)
    search(profile, out=tmp_path / "plan.json")
    with pytest.raises(InUseError, match=f"is in use: process {os.getpid()} on"):
        seconds[0].result()
