"""What an audit measures: ablations of single KV heads, and plans of equal bytes near the surrogate's optimum.

Ablations are drawn by layer and by how much their rule keeps, never by what an estimator says of them: picked by one
estimator they would flatter it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moacompress.core.arrays import Floats, Ints
from moacompress.core.errors import UsageError
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.rule import Rule
from moacompress.search.problem.knapsack import Knapsack, Pick

NOISE = (0.1, 2.0)
"""Widths of the lognormal noise on a KV head's costs, from the first plan beside the optimum to the last."""
REDRAWS = 10
"""Draws of noise for one plan, after which it is given up: there are not that many different plans."""


def masking_rules(shape: ModelShape, rules: Sequence[Rule], min_window: int, lengths: Sequence[int]) -> list[list[int]]:
    """Returns for every layer the rules that mask anything, by number, those first that keep least, mean over the lengths."""
    n = np.array(lengths, np.int64)
    found = []
    for native in shape.native_windows:
        keeps = np.array([rule.kept(n, min_window, native).mean() for rule in rules])
        order = np.argsort(keeps, kind="stable").tolist()
        found.append([rule for rule in order if keeps[rule] < Rule.FULL.kept(n, min_window, native).mean()])
    return found


def check_counts(shape: ModelShape, masking: Sequence[Sequence[int]], ablations: int, plans: int) -> None:
    """Refuses numbers of ablations or plans that there cannot be.

    Raises:
        UsageError: says how many there are.
    """
    there = shape.kv_heads * sum(map(len, masking))
    if not 1 <= ablations <= there:
        raise UsageError(
            f"an audit of {ablations:,} ablations is not possible: {shape.layers * shape.kv_heads:,} KV heads have {there:,} "
            f"rules that mask anything at these lengths; ask for 1 to {there:,}"
        )
    if plans < 0:
        raise UsageError(f"an audit of {plans} plans is not possible; ask for 0 or more")


def choose_ablations(shape: ModelShape, masking: Sequence[Sequence[int]], count: int, seed: int) -> list[Pick]:
    """Draws distinct ablations: every layer equally often, its KV heads too, and rules from the whole range.

    In each round every layer gets one, each from another part of the rules ordered by what they keep. There are as many as
    `count`.
    """
    rng = np.random.default_rng(seed)
    left = [[list(row) for _ in range(shape.kv_heads)] for row in masking]
    picks: list[Pick] = []
    while len(picks) < count:
        open_layers = [layer for layer, heads in enumerate(left) if any(heads)]
        layers = rng.permutation(open_layers)[: count - len(picks)].tolist()
        places = (rng.permutation(len(layers)) + rng.random(len(layers))) / len(layers)
        for layer, place in zip(layers, places.tolist(), strict=True):
            sizes = np.array([len(rules) for rules in left[layer]]) + 0.5 * rng.random(shape.kv_heads)
            head = int(sizes.argmax())
            rules = left[layer][head]
            picks.append((layer, head, rules.pop(int(place * len(rules)))))
    return picks


def equal_byte_choices(costs: Floats, knapsack: Knapsack, count: int, seed: int) -> list[tuple[float, Ints]]:
    """Returns different choices of rules, all filling one budget: the optimum, and optima of noisy costs.

    The noise is a lognormal factor for each KV head, wider from plan to plan; its width comes with each choice, and is 0 for
    the optimum. A small model may have fewer than `count` different choices. The costs are monotone influence, `[layers,
    kv_heads, rules]`.
    """
    rng = np.random.default_rng(seed)
    found: list[tuple[float, Ints]] = []
    seen: set[bytes] = set()
    for width in [0.0, *np.linspace(*NOISE, max(count - 1, 0)).tolist()][:count]:
        for _ in range(REDRAWS if width else 1):
            noise = np.exp(width * rng.standard_normal((*costs.shape[:2], 1)))
            choice = knapsack.choose(costs * noise)
            if choice.tobytes() not in seen:
                seen.add(choice.tobytes())
                found.append((width, choice))
                break
    return found
