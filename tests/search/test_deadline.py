"""The time of a search bounds all of it, and a plan is there from the beginning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moacompress.core.errors import ArtefactError
from moacompress.rules.plan import Plan
from tests.search.conftest import Search, make_profile


def test_the_time_bounds_every_step(search: Search, clock: Any, tmp_path: Path) -> None:
    """Whatever the search is at when its time is over: baselines, trials or the rest."""
    whole, all_of_it = search(make_profile(trials=2), out=tmp_path / "whole.json")
    for number, share in enumerate((0.03, 0.2, 0.45, 0.6, 0.97)):
        clock.now, timeout = 0.0, share * len(all_of_it.calls)
        out = tmp_path / f"{number}.json"
        result, fake = search(make_profile(trials=2, timeout=timeout), out=out)
        assert len(fake.calls) <= timeout + 1
        assert result.plan == Plan.load(out)
        assert result.plan.provenance["finished"] is False
        assert result.plan.kv_share(512) <= 0.5
        resumed, _ = search(make_profile(trials=2), out=out)
        assert resumed.plan.rules == whole.plan.rules
        assert resumed.harm == whole.harm


def test_stops_so_short_that_no_plan_is_measured_in_one_end_all_the_same(
    search: Search, clock: Any, tmp_path: Path
) -> None:
    whole, once = search(make_profile(trials=2), out=tmp_path / "whole.json")
    runs, calls, result, out = 0, 0, None, tmp_path / "plan.json"
    while result is None or not result.plan.provenance["finished"]:
        runs, clock.now = runs + 1, 0.0
        result, fake = search(make_profile(trials=2, timeout=12), out=out)
        assert len(fake.calls) <= 13
        calls += len(fake.calls)
        assert runs < 30
    assert result.plan.rules == whole.plan.rules
    assert calls == len(once.calls)  # nothing is measured twice


def test_a_plan_is_there_before_anything_is_measured(search: Search, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    died, fake = search(make_profile(), out=out, dies_at=0)
    assert died is None
    assert fake.calls == []
    early = Plan.load(out)
    assert early.kv_share(512) <= 0.5
    assert set(early.quality["measured_harm"].values()) == {None}
    assert early.quality["samples"] == 0
    assert early.provenance["trials"] == early.provenance["measured_plans"] == 0
    assert early.provenance["best_trial"] is None
    assert early.provenance["finished"] is False
    with pytest.raises(ArtefactError, match="is a plan of another search"):
        search(make_profile(), "60%", out=out)
    whole, _ = search(make_profile(), out=out)
    assert whole.plan == Plan.load(out)
    assert whole.plan.provenance["finished"] is True
    assert whole.harm["plan"] is not None


def test_an_early_plan_never_replaces_a_measured_one(search: Search, clock: Any, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    search(make_profile(trials=1), out=out)
    measured = Plan.load(out)
    for file in tmp_path.glob(
        "plan.study.journal*"
    ):  # what was measured is lost, so that trial 0 would be measured again
        file.unlink()
    result, _ = search(make_profile(trials=3, timeout=0.5), out=out)
    assert result.plan == Plan.load(out) == measured


def test_no_measurement_says_so(search: Search, clock: Any) -> None:
    result, fake = search(make_profile(timeout=0.5))
    assert len(fake.calls) <= 1
    assert result.harm["plan"] is None
    assert result.trials == result.measured_plans == 0
    assert result.best_trial is None
    assert result.explanation["stages"] == []
