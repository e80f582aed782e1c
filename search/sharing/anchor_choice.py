"""Which layers copy which anchors: so many layers of least total cost, where no anchor copies itself.

`costs[layer, k]` is the cost of layer `l` with the anchor `l - 1 - k`, infinity where it may not be.
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


def anywhere(costs: Floats, count: int) -> tuple[float, Anchors] | None:
    """Returns the least cost of so many copying layers and their anchors; None where there cannot be so many."""
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
