"""Rounds: profile again under the plan at hand, and move some of its bytes to where they are worth more.

Around the plan the change of every rule has a sign. The changes of many heads must not be added up, though: what gains alone
can be the same gain, and a few samples around the plan tell less than the many of the profile. So both are joined in one
quadratic form, which is minimised near the plan. How near, how far its pairs are believed, and whether it is of the mean harm
or of its mean logarithm, is a small study of its own, in every round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from moacompress.core.arrays import Ints
from moacompress.search.knapsack import Knapsack
from moacompress.search.quadratic import Quadratic

RANGES = {"moved": (0.0, 0.2), "coherence": (0.1, 0.9), "relative": (0.0, 1.0)}
"""Each knob of a round, its smallest and its largest value.

`moved`: share of the budget that changes hands; at 0 the plan is what it was.
`coherence`: share of the quadratic form, beside what it says of single KV heads.
`relative`: see `Quadratic.of`.
"""
NEUTRAL = {"moved": 0.0, "coherence": 0.5, "relative": 1.0}
"""Knobs that leave the plan as it is: trial 0 of every round."""
STARTS = (
    {"moved": 0.1, "coherence": 0.5, "relative": 1.0},
    {"moved": 0.1, "coherence": 0.9, "relative": 0.0},
    {"moved": 0.025, "coherence": 0.9, "relative": 0.0},
)
"""What is tried right after it."""


def moved(knapsack: Knapsack, form: Quadratic, knobs: Mapping[str, float], choice: Ints) -> Ints:
    """Returns the choice of least predicted harm within reach of the present one.

    Args:
        knapsack: bytes and limits.
        form: predicts harm, or its change.
        knobs: `moved` is the share of the longest length's limit that may change hands, `coherence` the weight of the form
            beside the sum of what it says of single KV heads.
        choice: the present rule of every KV head, `[layers, kv_heads]`.

    Returns:
        int64 `[layers, kv_heads]`.
    """
    if not knobs["moved"]:
        return choice
    here = np.take_along_axis(knapsack.sizes, choice[None, ..., None], axis=-1)
    distance = np.abs(knapsack.sizes - here)[-1:]
    limit = int(2 * knobs["moved"] * knapsack.limits[-1])  # what goes from one head to another counts twice
    near = replace(knapsack, sizes=np.concatenate([knapsack.sizes, distance]), limits=np.append(knapsack.limits, limit))
    return form.refined(choice, form.changes(choice), knobs["coherence"], near)
