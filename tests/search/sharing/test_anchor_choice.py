"""Which layers copy which anchors: the mixed-integer programme against all choices there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moacompress.search.sharing.share_choice import cheapest_anchors


def every_choice(costs: np.ndarray) -> dict[int, float]:
    """The least cost of every number of copying layers, by trying all."""
    layers, anchors = costs.shape
    best: dict[int, float] = {}
    options = [[None, *(layer - 1 - k for k in range(min(anchors, layer)))] for layer in range(layers)]
    for chosen in itertools.product(*options):
        pairs = {layer: anchor for layer, anchor in enumerate(chosen) if anchor is not None}
        if any(anchor in pairs for anchor in pairs.values()):
            continue
        cost = sum(costs[layer, layer - 1 - anchor] for layer, anchor in pairs.items())
        if np.isfinite(cost):
            best[len(pairs)] = min(cost, best.get(len(pairs), np.inf))
    return best


def drawn(seed: int) -> np.ndarray:
    """Costs of copies, some of which may not be."""
    rng = np.random.default_rng(seed)
    layers, anchors = int(rng.integers(1, 8)), int(rng.integers(1, 4))
    costs = np.exp(rng.normal(0, 2, (layers, anchors)))
    costs[rng.random(costs.shape) < 0.25] = np.inf
    for layer in range(layers):
        costs[layer, layer:] = np.inf
    return costs


def check(costs: np.ndarray, found: tuple[float, object], count: int, best: float) -> None:
    cost, pairs = found
    assert isinstance(pairs, dict)
    assert len(pairs) == count
    assert cost == pytest.approx(best)
    assert cost == pytest.approx(sum(costs[layer, layer - 1 - anchor] for layer, anchor in pairs.items()))
    assert not set(pairs) & set(pairs.values())


@pytest.mark.parametrize("seed", range(8))
def test_the_best_of_all_choices_is_found(seed: int) -> None:
    costs = drawn(seed)
    free = every_choice(costs)
    for count in range(max(free) + 2):
        somewhere = cheapest_anchors(costs, count)
        if count in free:
            assert somewhere is not None
            check(costs, somewhere, count, free[count])
        else:
            assert somewhere is None
