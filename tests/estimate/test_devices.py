"""What work takes on several devices: tasks are dealt out, and what is not divided is said."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moacompress.calibration.profile.estimate import LengthEstimate, ProfileEstimate
from moacompress.estimate.devices import makespan, on_devices
from moacompress.evaluation.eval_estimate import eval_seconds, eval_seconds_on
from moacompress.recipe import Recipe
from moacompress.search.search_estimate import search_seconds, search_seconds_on


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
    assert text == "On 8 devices as fast as this one: about 20 s, busy 50% of it; each loads the whole model."
    assert facts == {"devices": {"count": 8, "seconds": 20.0, "busy": 0.5, "bytes": 1000, "all_bytes": 8000}}


def test_samples_of_a_profile_are_divided_and_a_fit_of_all_layers_is_not() -> None:
    part = LengthEstimate(512, 12, 0, 6, 9216, 18.0, 72.0, 100, 1.0, 0.1, 24.0)
    one = ProfileEstimate.of((part,), 50)
    assert "devices" not in one.facts
    for devices, groups, seconds in ((2, 1, 9 + 24 + 24), (6, 1, 3 + 8 + 24), (6, 3, 3 + 8 + 8), (2, 3, 9 + 24 + 16)):
        many = ProfileEstimate.of((part,), 50, devices=devices, gate_groups=groups)
        assert many.seconds == one.seconds == 90
        assert many.facts["devices"]["seconds"] == pytest.approx(seconds)
        assert many.facts["devices"]["all_bytes"] == devices * 100


def test_one_device_takes_what_a_run_takes() -> None:
    recipe, forwards = Recipe(), [(8, 1.5), (4, 6.0)]
    alone = search_seconds(recipe, forwards)
    assert search_seconds_on(recipe, forwards, 1) == pytest.approx(alone)
    two, many = (search_seconds_on(recipe, forwards, devices) for devices in (2, 1000))
    assert alone / 2 < two < alone
    assert many == pytest.approx((2 + recipe.search.rounds + 1) * (8 * 1.5 + 4 * 6), rel=0.1)
    rates: Any = SimpleNamespace(forward=lambda length: length / 512, step=lambda length: 0.01)
    arguments = 2, [512, 8192], 10, 3, rates
    assert eval_seconds_on(*arguments, 1) == pytest.approx(eval_seconds(*arguments))
    assert eval_seconds_on(*arguments, 10**6) < eval_seconds_on(*arguments, 2) < eval_seconds(*arguments)
