"""What a person is told of how far work is, by a clock that is set by hand."""

from __future__ import annotations

from moacompress.cli.stage_clock import StageClock
from tests.clock import Clock


def made(**stages: float | None) -> tuple[StageClock, Clock]:
    clock = Clock()
    found = StageClock(clock)
    found.plan(stages, in_seconds=True)
    return found, clock


def test_without_stages_the_task_tells() -> None:
    clock = Clock()
    found = StageClock(clock)
    found.task(4)
    assert (found.label, found.left(), found.share()) == ("", None, 0.0)
    clock.now = 10.0
    found.step()
    assert (found.left(), found.share()) == (30.0, 0.25)


def test_what_is_left_is_the_rest_of_the_stage_and_all_behind_it() -> None:
    found, clock = made(profile=100.0, search=200.0, export=10.0)
    assert found.stage("profile")
    assert (found.label, found.left(), found.share()) == ("1 of 3: profile", 310.0, 0.0)
    clock.now = 40.0
    assert found.left() == 270.0
    clock.now = 200.0  # it took twice as long, and so will the rest
    assert found.stage("search")
    assert found.label == "2 of 3: search"
    assert found.left() == 2 * 210.0
    found.task(10)
    clock.now = 320.0
    found.step()  # which took 120 seconds: nine more, and the export
    assert found.left() == 9 * 120.0 + 20.0
    assert found.share() == 320.0 / (320.0 + 1100.0)
    assert not found.stage("unknown")


def test_a_stage_that_was_done_before_says_nothing_of_pace() -> None:
    found, clock = made(profile=100.0, search=200.0)
    found.stage("profile")
    clock.now = 0.2
    found.stage("search")
    assert found.left() == 200.0


def test_numbers_that_are_no_seconds_get_their_pace_from_the_work() -> None:
    clock = Clock()
    found = StageClock(clock)
    found.plan({"trials": 2.0, "rounds": 1.0}, in_seconds=False)
    found.stage("trials")
    assert found.left() is None
    found.task(4)
    clock.now = 30.0
    found.step()
    assert found.left() == 90.0 + 60.0
    clock.now = 100.0
    found.stage("rounds")
    assert found.left() == 50.0


def test_who_plans_first_decides() -> None:
    found, _ = made(profile=None, search=None)
    found.plan({"trials": 1.0}, in_seconds=False)
    assert not found.stage("trials")
    found.stage("profile")
    assert found.left() is None  # nothing is known of how long they take
    found.plan({"profile": 5.0, "search": 6.0}, in_seconds=True)
    assert found.left() == 11.0
