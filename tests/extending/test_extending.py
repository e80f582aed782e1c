"""What a package from outside adds by entry points is there like our own: a task, a backend, and a way to evict tokens."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.preloaded import Preloaded

OUTSIDE = Path(__file__).resolve().parent / "outside"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Returns what runs the program where the package from outside is installed."""
    made = Preloaded(OUTSIDE)
    yield made.run
    made.close()


@pytest.fixture(scope="module")
def listed(run: Run) -> subprocess.CompletedProcess[str]:
    return run("eval", "--list-tasks", "--json")


def test_a_task_from_outside_is_listed(listed: subprocess.CompletedProcess[str]) -> None:
    tasks = {task["task"]: task for task in json.loads(listed.stdout)["tasks"]}
    assert tasks["colours"]["description"] == "the colour of one thing of four"
    assert tasks["recall"]["description"] != "a name that is taken"


def test_what_cannot_be_used_is_left_out_and_said(listed: subprocess.CompletedProcess[str]) -> None:
    said = " ".join(listed.stderr.split())
    assert "broken of outside_task:MISSING cannot be loaded and is left out" in said
    assert "no-task, an entry point of moacompress.tasks, is no task and is left out" in said
    assert "again, an entry point of moacompress.tasks, has the name of another task, recall, and is left out" in said


def test_a_task_and_a_backend_from_outside_are_used(run: Run, compressed: Path, tmp_path: Path) -> None:
    ask: list[Any] = ["--tasks", "colours", "--lengths", "500", "--prompts", "2", "--against", "dense", "--json"]
    done = run("eval", compressed, *ask, "--log-file", tmp_path / "log", "-v")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {(row["task"], row["prompts"]) for row in found["results"] if row["metric"] == "nll"} == {("colours", 2)}
    assert found["wording"]["colours"]
    assert "counted" in done.stderr
    ours = run("eval", compressed, *ask, MOACOMPRESS_KERNEL="reference")
    assert json.loads(ours.stdout)["results"] == found["results"]


def test_a_way_to_evict_from_outside_is_measured(run: Run, compressed: Path, tmp_path: Path) -> None:
    ask: list[Any] = [
        "--tasks",
        "needle-noise",
        "--lengths",
        "500",
        "--prompts",
        "2",
        "--against",
        "newest-half,snapkv:seen",
    ]
    done = run("eval", compressed, *ask, "--json", "--log-file", tmp_path / "log")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = {row["model"]: row for row in found["results"] if row["metric"] == "nll"}
    assert list(rows) == ["plan", "newest-half:unseen", "newest-half:seen", "snapkv:seen"]
    assert rows["newest-half:seen"]["readings"] == 1
    said = " ".join(done.stderr.split())
    assert (
        "no-baseline, an entry point of moacompress.baselines, is no class of a baseline and is left out: 0.5" in said
    )
    assert (
        "again, an entry point of moacompress.baselines, has the name of another baseline, snapkv, and is left" in said
    )


def test_the_names_of_all_are_in_the_refusal(run: Run, compressed: Path) -> None:
    done = run("eval", compressed, "--against", "zzzz")
    assert done.returncode == 2
    assert "keydiff, kvzip, newest-half, " in " ".join(done.stderr.split())


@pytest.mark.heavy
def test_gates_are_fitted_to_a_score_from_outside(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "calibration: {sources: [{generator: needle}], lengths: [500], samples: 2, validation_samples: 1, text_samples: 0, "
        "answer_tokens: 2}\nprofile: {draws: 1, gates: true, gate_samples: 2, scorer: key-norm}\n"
    )
    done = run("profile", tiny_folder, "--recipe", recipe, "-o", tmp_path / "profile", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["gates"]["scorer"] == "key-norm"
    said = " ".join(done.stderr.split())
    assert "no-scorer, an entry point of moacompress.scorers, is no class of a scorer and is left out" in said
    refused = run("profile", tiny_folder, "--recipe", recipe, "--scorer", "snapkv", "-o", tmp_path / "other")
    assert refused.returncode == 2
    assert "no gate can be fitted to snapkv" in " ".join(refused.stderr.split())
    assert "expected-attention, key-norm" in " ".join(refused.stderr.split())
