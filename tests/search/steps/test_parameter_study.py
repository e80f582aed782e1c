"""The study: which trials run, what is said of them, and that hopeless ones are given up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from moacompress.search.predict.search_parameters import START_PRECISION, SearchParameters
from moacompress.search.predict.surrogate import Surrogate
from tests.search.conftest import FakeObjective, Search, make_profile


def test_hopeless_plans_are_pruned_and_never_win(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    def _keys(fake: Any) -> list[str]:
        return [key for key, _ in fake.calls]

    honest = FakeObjective._cost
    monkeypatch.setattr(
        FakeObjective, "_cost", lambda self, *where: honest(self, *where) * (1 if len(set(_keys(self))) < 10 else 50)
    )
    result, fake = search(make_profile(trials=8))
    counts = {key: _keys(fake).count(key) for key in _keys(fake)}
    seen = [count for count in counts.values() if count < fake.size]
    assert seen, "a plan 50 times worse is not measured on all samples"
    assert counts[result.plan.key()] == fake.size


def test_starts_are_tried_first(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Mapping[str, float]] = []
    bend = SearchParameters.bend

    def noted(self: SearchParameters, surrogate: Surrogate, values: Mapping[str, float]) -> Any:
        given.append(values)
        return bend(self, surrogate, values)

    monkeypatch.setattr(SearchParameters, "bend", noted)
    neutral = dict.fromkeys(search(make_profile(trials=1))[0].plan.provenance["knobs"], 0.0)
    start = dict.fromkeys(neutral, 0.2)
    keys = set()
    for starts, first in (([start], True), ([], False)):
        given.clear()
        keys.add(search(make_profile(trials=2), starts=starts)[0].plan.provenance["search"])
        assert (next(values for values in given if values != neutral) == start) == first
    assert len(keys) == 1


def test_where_formats_are_on_offer_cheaper_ones_are_tried_early() -> None:
    parameters = SearchParameters(layers=4, lengths=(512,), coherent=True, formats=True)
    assert parameters.starts[0] == {**parameters.neutral, "precision": START_PRECISION}
    assert parameters.within({"precision": -9.0})["precision"] == parameters.ranges["precision"][0]
    assert "precision" not in SearchParameters(layers=4, lengths=(512,), coherent=True).starts[0]
