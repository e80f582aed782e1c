"""Searches in which layers may share: measured KL decides, nothing else changes, and every step handles such plans."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moacompress.calibration.profile.store import Profile
from moacompress.core.errors import InfeasibleBudgetError
from moacompress.core.progress import SILENT
from moacompress.repair.copies import CopyRepair
from moacompress.report.search_tables import explanation_tables
from moacompress.rules.limits import is_within
from moacompress.rules.plan import Plan
from moacompress.search import search_request
from moacompress.search.measure.packed_plan import unpack
from moacompress.search.search_request import SearchRequest
from moacompress.search.sharing.share_choice import PROTECTED, REPAIRED
from tests.search.conftest import Search, make_profile


def fits(plan: Plan, profile: Profile, budget: str) -> bool:
    return is_within(plan, SearchRequest.of(profile, budget, profile.recipe).limits)


def test_copies_that_cost_nothing_are_found(search: Search) -> None:
    settings: dict[str, Any] = {"layers": 10, "anchors": 2, "copying": 1e-6, "trials": 5}
    alone = search(make_profile(**settings), "25%")[0]
    profile = make_profile(**settings, share="auto")
    found = search(profile, "25%")[0]
    assert any(found.plan.shares)
    assert found.harm["trial0"] == pytest.approx(alone.harm["trial0"])  # it does not share
    assert found.harm["plan"] < alone.harm["trial0"]
    assert fits(found.plan, profile, "25%")
    notes = found.explanation["sharing"]
    assert notes["asked"] == "auto"
    assert notes["shared"] == sum(share is not None for share in found.plan.shares)
    assert notes["most"] == 4  # in the layers between those with windows of their own
    first = notes["counts"][0]
    assert (first["layers"], first["pairs"], first["copies"]) == (0, [], 0)
    assert first["harm"] == pytest.approx(found.harm["trial0"])
    one = notes["counts"][1]
    assert one["layers"] == 1
    assert one["predicted"] < first["predicted"]
    assert found.plan.quality["predicted_harm"] is not None


def test_a_budget_that_only_sharing_makes_possible(search: Search) -> None:
    profile = make_profile(layers=9, anchors=2, copying=1e-6, trials=2, share="3")
    with pytest.raises(InfeasibleBudgetError):
        SearchRequest.of(profile, "18%", profile.recipe.override(search__share="off"))
    found = search(profile, "18%")[0]
    assert fits(found.plan, profile, "18%")
    alone, three = found.explanation["sharing"]["counts"]
    assert (alone["layers"], alone["predicted"]) == (0, None)
    assert three["predicted"] is not None
    assert [*explanation_tables(found.explanation)]


def test_copies_that_cost_much_are_left_and_that_is_said(search: Search) -> None:
    profile = make_profile(anchors=2, copying=1e6, share="auto", trials=4)
    found = search(profile, "50%")[0]
    assert found.plan.shares == ()
    notes = found.explanation["sharing"]
    assert (notes["most"], notes["shared"]) == (1, 0)
    row = notes["counts"][1]
    assert row["copies"] > notes["counts"][0]["predicted"]
    assert row["difference"] is None or row["difference"]["value"] > 0  # None where its trial was pruned
    said = [shown for shown in explanation_tables(found.explanation) if isinstance(shown, str)]
    assert any("Sharing buys nothing at this budget" in text for text in said)


def test_without_sharing_nothing_changes(search: Search) -> None:
    plain, other = (search(make_profile(anchors=anchors, trials=3))[0] for anchors in (0, 2))
    assert plain.plan.key() == other.plan.key()
    assert plain.plan.provenance["search"] == other.plan.provenance["search"]
    assert "sharing" not in other.explanation


def test_fixed_shares_go_through_all_steps(search: Search) -> None:
    profile = make_profile(anchors=2, copying=1e-3, share="layers=2:1,3:1", trials=3, alternatives=False, formats=True)
    found = search(profile, "40%")[0]
    assert [share and share.anchor for share in found.plan.shares] == [None, None, 1, 1, None, None]
    assert fits(found.plan, profile, "40%")
    names = {stage["name"].partition(",")[0] for stage in found.explanation["stages"]}
    assert {"surrogate", "study"} <= names
    for stage in found.explanation["stages"]:
        assert any(unpack(stage["plan"], profile).shares)
    assert [row["layers"] for row in found.explanation["sharing"]["counts"]] == [0, 2]
    assert found.explanation["sharing"]["counts"][1]["harm"] is not None


def test_parameters_of_another_budget_stay_in_range(search: Search) -> None:
    profile = make_profile(anchors=2, copying=1e6, share="auto", trials=4)
    request = SearchRequest.of(profile, "50%", profile.recipe)
    start = {**request.parameters.neutral, "sharing": 7.0, "exponent": 0.1}
    assert request.parameters.within(start)["sharing"] == request.parameters.shared == 1
    result = search(profile, "50%", starts=[start])[0]
    assert result.trials == 4


def test_copies_are_priced_and_measured_after_a_repair(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"layers": 10, "anchors": 3, "copying": 100.0, "share": "auto", "trials": 4}
    given: list[Any] = []

    def repaired(model: Any, shape: Any, copies: Any, *rest: Any) -> list[CopyRepair]:
        given.extend(copies)
        return [CopyRepair({f"layer {layer} of {share.anchor}": torch.ones(1)}, 1e-4) for layer, share in copies]

    monkeypatch.setattr(search_request, "repaired_copies", repaired)
    plain = make_profile(**settings)
    profile = make_profile(**settings, assume_repaired=True)
    request = SearchRequest.of(profile, "25%", profile.recipe)
    source = SimpleNamespace(model=None)
    monkeypatch.setattr(Profile, "calibration_samples", lambda self: self.validation)
    after = request.repaired(source, SILENT)  # type: ignore[arg-type]
    assert after.key == request.key != SearchRequest.of(plain, "25%", plain.recipe).key
    assert after.repaired(source, SILENT) is after  # type: ignore[arg-type]
    assert request.sharing is not None
    assert after.sharing is not None
    before, repaired_costs = request.sharing.costs.table(), after.sharing.costs.table()
    cheapest = np.sort(before, axis=1)
    for layer, share in given:
        place = layer, layer - 1 - share.anchor
        assert before[place] <= cheapest[layer, REPAIRED - 1]
        assert repaired_costs[place] == pytest.approx(1e-4 * before[place])
    assert min(layer for layer, _ in given) == PROTECTED
    asked = {**settings, "share": "2", "alternatives": False}
    found = search(make_profile(**asked, assume_repaired=True), "25%")[0]
    assert sum(share is not None for share in found.plan.shares) == 2
    assert found.plan.quality["assumed_repaired"] is True
    weights = after.weights_of(found.plan)
    assert set(weights) == {
        f"layer {layer} of {share.anchor}" for layer, share in enumerate(found.plan.shares) if share is not None
    }
    notes = found.explanation["sharing"]
    assert {row["left"] for row in notes["repaired"]} == {1e-4}
    assert any("after a repair" in shown for shown in explanation_tables(found.explanation) if isinstance(shown, str))
    assert after.weights_of(Plan.full(profile.shape)) == {}


def test_named_copies_are_the_ones_that_are_repaired() -> None:
    profile = make_profile(anchors=2, share="layers=2:1,3:1")
    sharing = SearchRequest.of(profile, "40%", profile.recipe).sharing
    assert sharing is not None
    assert [(layer, share.anchor) for layer, share in sharing.copies()] == [(2, 1), (3, 1)]
