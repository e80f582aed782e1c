"""The study: which trials run, what is said of them, and that hopeless ones are given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moacompress.calibration.profile.store import Profile

Profiles = Callable[..., Profile]
Search = Callable[..., tuple[Any, Any]]


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


def test_starts_are_tried_first(search: Search, profiles: Profiles) -> None:
    parameters = dict.fromkeys(search(profiles(trials=1))[0].plan.provenance["knobs"], 0.5)
    found = search(profiles(trials=2), starts=[parameters])[0]
    other = search(profiles(trials=2))[0]
    assert found.plan.provenance["search"] == other.plan.provenance["search"]
    bent, sampled = (result.explanation["predicted"]["pairs"] for result in (found, other))
    assert bent[0] == sampled[0]
    assert bent[1:] != sampled[1:]
