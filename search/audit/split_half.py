"""Are the calibration samples enough? What the plan of one half of them costs by the judgement of the other half."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from moacompress.calibration.profile.store import Profile
from moacompress.core.arrays import Floats, Ints
from moacompress.search.audit.statistics import FLOOR
from moacompress.search.problem.knapsack import Knapsack, total_cost
from moacompress.search.problem.plan_space import PlanSpace
from moacompress.search.search_request import SearchRequest

SPLITS = 8
"""Random splits at each number of samples."""
LADDER = sorted(base << power for base in (16, 24) for power in range(12))


def split_half(request: SearchRequest, seed: int) -> list[dict[str, Any]]:
    """Returns how many times the other half's own plan a half's plan costs, at growing numbers of samples.

    For each number of samples, both halves together: `samples`, `ratio` (mean over splits and both directions) and `max`. There
    is no interval: splits deal the same samples again, so their spread says nothing of other samples. Numbers at which a half
    would lack a kind of samples are left out.
    """
    there = len(request.profile.sample_lengths)
    rng = np.random.default_rng(seed)
    knapsack = PlanSpace.of(request).knapsack
    found = []
    for count in [*(number for number in LADDER if number < there), there]:
        splits = [halves(request.profile, count, rng) for _ in range(SPLITS)]
        if not all(
            _kinds(request.profile, half) == set(request.profile.sample_kinds) for two in splits for half in two
        ):
            continue
        ratios = np.array([_ratios(request, knapsack, *two) for two in splits])
        found.append({"samples": count, "ratio": float(ratios.mean()), "max": float(ratios.max())})
    return found


def halves(profile: Profile, count: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Draws two disjoint sets of samples by index, `count` together, alike in lengths and kinds."""
    strata = list(zip(profile.sample_kinds, profile.sample_lengths.tolist(), strict=True))
    sizes, before = Counter(strata), Counter[tuple[str, int]]()
    order = rng.permutation(len(strata)).tolist()
    places = {}
    for index in order:  # where a sample stands in its stratum, as a share: the first ones are of all strata
        places[index] = (before[strata[index]] + 0.5) / sizes[strata[index]]
        before[strata[index]] += 1
    taken = sorted(order, key=places.__getitem__)[:count]
    taken.sort(key=strata.__getitem__)  # stable: in random order within a stratum
    return np.array(taken[::2], np.int64), np.array(taken[1::2], np.int64)


def _kinds(profile: Profile, samples: Ints) -> set[str]:
    return {profile.sample_kinds[index] for index in samples.tolist()}


def _ratios(request: SearchRequest, knapsack: Knapsack, *two: Ints) -> list[float]:
    costs: list[Floats] = []
    for half in two:
        part = SearchRequest.of(request.profile.subset(half.tolist()), request.asked, request.recipe)
        costs.append(part.surrogate.costs())
    choices = [knapsack.choose(cost) for cost in costs]
    own = [total_cost(cost, choice) for cost, choice in zip(costs, choices, strict=True)]
    other = [total_cost(cost, choice) for cost, choice in zip(costs, choices[::-1], strict=True)]
    return [(theirs + FLOOR) / (ours + FLOOR) for theirs, ours in zip(other, own, strict=True)]
