"""A search without a storage of its own never works beside another one; what a killed one owned is taken over."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest

from moacompress.calibration.profile.store import Profile
from moacompress.core.errors import ArtefactError
from moacompress.search.measure.storages import open_storage

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
find_plan(profile, "50%", out=sys.argv[2], model=source)
"""


@pytest.fixture
def measuring(search_script: str) -> Measuring:
    """Runs a search in a process of its own, which is in the middle of measuring and waits for a line."""

    @contextmanager
    def run(out: Path) -> Iterator[subprocess.Popen[str]]:
        command = [sys.executable, "-c", search_script + HOLDING, str(HERE / "conftest.py"), str(out)]
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
    states = {trial.state.name for trial in optuna.load_study(storage=open_storage(storage), study_name=name).trials}
    assert states == {"COMPLETE"}
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".owner"] == []


def test_a_killed_search_is_taken_over(search: Search, measuring: Measuring, tmp_path: Path) -> None:
    whole, fake = search(out=tmp_path / "whole.json")
    with measuring(tmp_path / "plan.json") as process:
        process.kill()
    assert len([path for path in tmp_path.iterdir() if path.suffix == ".owner"]) == 1
    result, rest = search(out=tmp_path / "plan.json")
    assert result.plan.rules == whole.plan.rules
    assert len(rest.calls) <= len(fake.calls) - 60
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".owner"] == []
