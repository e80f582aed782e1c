"""Which layers copy which anchors: so many layers of least total cost, where no anchor copies itself.

`in_segments` has the reuse layers of an anchor follow it at once, one after the other: an exact dynamic programme, for all
numbers of layers together. `anywhere` lets them have other layers between: a mixed-integer programme, one for each number.
Both take `costs[layer, k]`, the cost of layer `l` with the anchor `l - 1 - k`, infinity where it may not be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

from moacompress.core.arrays import Floats

Anchors: TypeAlias = Mapping[int, int]
"""The anchor of every layer that copies, by layer."""
GAP = 1e-9
"""Relative gap at which the mixed-integer programme is called solved."""


def in_segments(costs: Floats) -> list[tuple[float, Anchors]]:
    """Returns for every number of copying layers, from 0 to the most there can be, the least cost and the anchors.

    The layers fall into segments of an anchor and its reuse layers, of which there may be none: `best[n]` of the layers so far
    is the least, over the last segment, of `best[n - its_reuse_layers]` of the layers before it and its cost.

    Args:
        costs: `[layers, anchors]`.
    """
    layers, anchors = costs.shape
    best: list[dict[int, tuple[float, dict[int, int]]]] = [{0: (0.0, {})}]
    for end in range(layers):  # the last layer of the last segment
        found: dict[int, tuple[float, dict[int, int]]] = {}
        for reuse_layers in range(min(end, anchors) + 1):
            anchor = end - reuse_layers
            cost = float(sum(costs[layer, layer - 1 - anchor] for layer in range(anchor + 1, end + 1)))
            if not np.isfinite(cost):
                continue
            for count, (before, chosen) in best[anchor].items():
                total = before + cost
                if count + reuse_layers not in found or total < found[count + reuse_layers][0]:
                    segment = dict.fromkeys(range(anchor + 1, end + 1), anchor)
                    found[count + reuse_layers] = total, {**chosen, **segment}
        best.append(found)
    return [best[layers][count] for count in sorted(best[layers])]


def anywhere(costs: Floats, count: int) -> tuple[float, Anchors] | None:
    """Returns the least cost of so many copying layers and their anchors; None where there cannot be so many.

    Args:
        costs: `[layers, anchors]`.
        count: layers that copy.
    """
    from scipy import optimize, sparse

    layer, index = np.nonzero(np.isfinite(costs))
    if count == 0:
        return 0.0, {}
    if not len(layer):
        return None
    of_pairs = costs[layer, index]
    anchor, pairs = layer - 1 - index, np.arange(len(layer))
    copies = sparse.csr_array((np.ones(len(pairs)), (layer, pairs)), shape=(len(costs), len(pairs)))
    # one row a pair: it is there, or its anchor copies, or neither
    chains = sparse.csr_array(copies[anchor] + sparse.identity(len(pairs), format="csr"))
    scale = float(of_pairs.max()) or 1.0
    found = optimize.milp(
        of_pairs / scale,
        constraints=[
            optimize.LinearConstraint(copies, -np.inf, 1),
            optimize.LinearConstraint(chains, -np.inf, 1),
            optimize.LinearConstraint(np.ones((1, len(pairs))), count, count),
        ],
        integrality=np.ones(len(pairs)),
        bounds=optimize.Bounds(0, 1),
        options={"mip_rel_gap": GAP},
    )
    if found.x is None:
        return None
    chosen = found.x > 0.5
    total = float(of_pairs[chosen].sum())
    return total, dict(sorted(zip(layer[chosen].tolist(), anchor[chosen].tolist(), strict=True)))
