"""Plans whose layers share, in one budget: groups of KV heads are the rows of the knapsack, and bytes are exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moacompress.calibration.profile.statistics import Statistics
from moacompress.calibration.profile.store import Profile
from moacompress.rules.limits import is_within, layer_floors, meets
from moacompress.rules.rule import Rule
from moacompress.rules.share import LayerShares, Share
from moacompress.search.problem.plan_space import PlanSpace
from moacompress.search.problem.quadratic import Quadratic
from moacompress.search.search_request import SearchRequest
from tests.search.conftest import make_profile

SHARES: LayerShares = (None, None, Share(1, (1, 0)), Share(1, (0, 0)), None, Share(0, (1, 1)))
"""KV head 0 of layer 1 serves three, KV head 0 of layer 0 none."""


def space_of(profile: Profile, budget: str = "40%", shares: LayerShares = SHARES, **search: Any) -> PlanSpace:
    recipe = profile.recipe.override(**{f"search__{name}": value for name, value in search.items()})
    return SearchRequest.of(profile, budget, recipe).space(shares)


def used(space: PlanSpace, choice: np.ndarray) -> list[int]:
    taken = np.take_along_axis(space.knapsack.sizes, choice[None, ..., None], -1)
    return taken.sum(axis=(1, 2, 3)).tolist()


@pytest.mark.parametrize("formats", [False, True])
def test_bytes_of_groups_are_those_of_the_plan(formats: bool) -> None:
    space = space_of(make_profile(formats=formats))
    assert space.groups is not None
    rng = np.random.default_rng(0)
    rows, rules = space.knapsack.sizes.shape[1], space.knapsack.sizes.shape[3]
    assert rows == 6
    for _ in range(20):
        choice = rng.integers(rules, size=(rows, 1))
        plan = space.plan(choice)
        assert plan.shares == SHARES
        assert used(space, choice) == [plan.kv_bytes(n) for n in (256, 512)]
        assert np.array_equal(space.choice(plan), choice)
        for layer, share in enumerate(SHARES):
            if share is not None:
                assert plan.rules[layer] == tuple(plan.rules[share.anchor][of] for of in share.head_map)


def test_costs_and_forms_of_groups_are_sums() -> None:
    profile = make_profile(formats=True)
    profile = profile.offering(("int8", "int4"))
    space = space_of(profile)
    rng = np.random.default_rng(1)
    rules = len(profile.rules)
    costs = rng.random((6, 2, rules))
    of_rows = space.costs(costs)
    form = Quadratic(rng.normal(size=(5, 12, rules)))
    merged = space.form(form)
    for _ in range(5):
        choice = rng.integers(rules, size=(6, 1))
        assert space.groups is not None
        heads = space.groups.spread(choice[:, 0])
        assert np.take_along_axis(of_rows, choice[..., None], -1).sum() == pytest.approx(
            np.take_along_axis(costs, heads[..., None], -1).sum()
        )
        assert merged.kl(choice) == pytest.approx(form.kl(heads))


@pytest.mark.parametrize("budget", ["12%", "40%", "75%"])
def test_what_is_chosen_is_within_the_budget(budget: str) -> None:
    profile = make_profile(formats=True, anchors=2)
    for share in ("1", "2", "layers=2:1,3:1"):
        for coherence in (0.0, 0.5):
            request = SearchRequest.of(profile, budget, profile.recipe.override(search__share=share))
            parameters = {**request.parameters.neutral, "coherence": coherence}
            plan = request.plan(parameters)
            assert sum(one is not None for one in plan.shares) == (1 if share == "1" else 2)
            assert is_within(plan, request.limits)
            assert "sharing" not in parameters


def test_floors_hold_in_groups() -> None:
    profile = make_profile()
    space = space_of(profile, "45%", floors={3: 1.0})
    assert space.groups is not None
    rng = np.random.default_rng(0)
    costs = rng.random((6, 2, len(profile.rules)))
    costs[..., 0] = 0
    costs[1:4] = 0  # nothing but the floor asks for more than the smallest rule
    plan = space.plan(space.knapsack.choose(space.costs(costs)))
    assert all(rule.is_full for rule in plan.rules[3])
    assert plan.rules[1][0].is_full
    assert not plan.rules[1][1].is_full
    assert all(plan.kv_bytes(n) <= limit for n, limit in zip((256, 512), space.knapsack.limits.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_floors_hold_where_influences_cancel(seed: int) -> None:
    """Layers that move the logits apart make a smaller rule look better than the whole: no form may take that below a floor."""
    floors = {0: 1.0, 3: 0.6}
    profile = make_profile(seed=seed, floors=floors)
    signs = np.random.default_rng(seed).choice([-1, 1], profile.statistics.arrays["total"].shape[:4])[..., None]
    arrays = {name: np.concatenate([array] * 4) for name, array in profile.statistics.arrays.items()}
    arrays["total"] = np.concatenate([profile.statistics.arrays["total"] * signs] * 4).astype(np.float32)
    lengths, kinds = np.concatenate([profile.sample_lengths] * 4), profile.sample_kinds * 4
    profile = replace(profile, statistics=Statistics(arrays), sample_lengths=lengths, sample_kinds=kinds)
    request = SearchRequest.of(profile, "60%", profile.recipe)
    for coherence in (0.0, 0.3, 0.8):
        plan = request.plan({**request.parameters.neutral, "coherence": coherence})
        assert meets(plan, layer_floors(floors, profile.shape), profile.lengths)
        assert plan.rules[0] == (Rule.FULL, Rule.FULL)
