"""What work takes on several devices: tasks are dealt out, and what is not divided is said."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from moacompress.calibration.profile.estimate import profile_work, sample_counts
from moacompress.cli import app
from moacompress.estimate.devices import makespan, on_devices
from moacompress.estimate.estimator import Estimator
from moacompress.estimate.work import Kind
from moacompress.evaluation.eval_estimate import eval_work
from moacompress.recipe import Recipe
from moacompress.search.search_estimate import measurements, search_work


@pytest.mark.parametrize("seed", range(10))
def test_tasks_are_done_no_sooner_than_is_possible_and_no_later_than_a_third_more(seed: int) -> None:
    tasks = np.random.default_rng(seed).uniform(0.1, 5, 6).tolist()
    for devices in (1, 2, 3):
        best = min(
            max(sum(task for task, where in zip(tasks, choice, strict=True) if where == one) for one in range(devices))
            for choice in itertools.product(range(devices), repeat=len(tasks))
        )
        assert best - 1e-9 <= makespan(tasks, devices) <= best * (4 / 3) + 1e-9
    assert makespan(tasks, 100) == max(tasks)
    assert makespan([], 3) == 0


def test_what_is_said() -> None:
    text, facts = on_devices(80.0, 20.0, 8, 1000)
    assert text == ["On 8 devices as fast as this one: about 20 s, busy 50% of it; each loads the whole model."]
    assert facts == {"devices": {"count": 8, "seconds": 20.0, "busy": 0.5, "bytes": 1000, "all_bytes": 8000}}
    assert on_devices(80.0, 80.0, 1, 1000) == ([], {})


class Known(Estimator):
    """A second a token of a prompt or a sample, and a tenth a step."""

    def one(self, kind: Kind, tokens: int, targets: int = 1) -> float:
        return 0.1 if kind is Kind.STEP else float(tokens)


@pytest.fixture
def known() -> Estimator:
    return Known(None, "cpu")


def test_samples_of_a_profile_are_divided_and_a_fit_of_all_layers_is_not(known: Estimator) -> None:
    asked = {"lengths": [512], "samples": 12, "validation_samples": 6, "longer_samples": 0, "answer_tokens": 10}
    profile = {"gates": True, "gate_samples": 6, "centres": False}
    recipe = Recipe.from_dict({"calibration": asked, "profile": profile})
    answer, sample, fitting = 512 + 10 * 0.1, 512, (6 + 6) * 512
    for hidden, groups in ((64, 1), (16383, 2)):  # sums of two layers do not fit together
        work = profile_work(recipe, sample_counts(recipe, 4096), layers=2, hidden=hidden)
        assert known.seconds(work) == pytest.approx((18 + 6) * answer + (12 + 6) * sample + groups * fitting)
        for devices in (2, 6):
            once = groups * fitting if groups == 1 else fitting
            wanted = (24 * answer + 18 * sample) / devices + once
            assert known.seconds(work, devices) == pytest.approx(wanted, rel=0.01)


def test_measurements_of_a_search_are_divided_and_waits_are_not(known: Estimator) -> None:
    recipe = Recipe()
    work = search_work(recipe, {8: 15, 64: 10, 100: 0})
    one = 8 * 15 + 64 * 10
    alone, two, many = (known.seconds(work, devices) for devices in (1, 2, 1000))
    assert alone == pytest.approx(sum(measurements(recipe, 25).values()) * one)
    assert alone / 2 < two < alone
    waits = 2 + recipe.search.rounds + (recipe.search.moves > 0)
    assert waits * one < many < (waits + 1) * one


def test_batches_of_an_evaluation_are_divided(known: Estimator) -> None:
    work = eval_work({("a", 512): 40, ("a", 8192): 10, ("b", 512): 0}, 3)
    alone = known.seconds(work)
    assert alone == pytest.approx(3 * (40 * (1.2 * 512 + 1.6) + 10 * (1.2 * 8192 + 1.6)))
    assert alone / 2 < known.seconds(work, 2) < alone
    assert known.seconds(work, 10**4) == pytest.approx(
        16 * (1.2 * 512 + 1.6) * 120 / 9 / 16 + 1.2 * 8192 + 1.6, rel=0.01
    )


def test_commands(tiny_folder: Path, compressed: Path, tmp_path: Path) -> None:
    def run(*arguments: str | Path) -> Any:
        return CliRunner().invoke(app, [*map(str, arguments)])

    small = ("--lengths", "192", "--samples", "4", "--validation-samples", "2")
    done = run("profile", tiny_folder, "-o", tmp_path / "p", *small, "--dry-run", "--devices", "4", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["devices"]["count"] == 4
    assert found["devices"]["seconds"] < found["seconds"]
    assert found["devices"]["all_bytes"] == 4 * found["peak_bytes"]
    done = run("eval", compressed, "--lengths", "700", "--prompts", "40", "--dry-run", "--devices", "4")
    assert done.exit_code == 0, done.stderr
    assert "On 4 devices as fast as this one: about " in " ".join(done.stdout.split())
    for command in (("profile", tiny_folder), ("eval", compressed), ("search", tmp_path)):
        assert "--devices has no effect without --dry-run" in run(*command, "--devices", "4").stderr
