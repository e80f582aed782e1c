"""The audit of copies: one layer attends as an earlier one does, by the best head map, and all else is dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from moacompress.calibration.samples import Sample
from moacompress.calibration.statistics import OF_FORMATS
from moacompress.calibration.store import Profile
from moacompress.core.arrays import Floats
from moacompress.rules.plan import Plan
from moacompress.rules.share import Share
from moacompress.search.audit_statistics import rank_and_ratio
from moacompress.search.sharing.copy_costs import CopyCosts

CopyPick: TypeAlias = tuple[int, Share]
"""A layer, and its copy."""


def copy_costs(profile: Profile, samples: Sequence[Sample]) -> CopyCosts | None:
    """Returns what copies are predicted to cost on samples like these; None where the profile has none.

    Each sample counts with the influence at the profiled length nearest to its own, of its kind, by the recipe's estimator,
    or by `fisher` where that says nothing of copies.

    Args:
        profile: of the dense model.
        samples: those measured on.
    """
    if "copy_squares" not in profile.statistics.arrays:
        return None
    groups = Counter(
        (sample.kind, min(profile.lengths, key=lambda length: abs(length - sample.length))) for sample in samples
    )
    found = {group: CopyCosts.at(profile, copy_estimator(profile), *group) for group in groups}
    whole = np.average([costs.influence for costs in found.values()], axis=0, weights=list(groups.values()))
    return replace(next(iter(found.values())), influence=whole)


def copy_estimator(profile: Profile) -> str:
    """Returns the estimator that copies are predicted by."""
    wanted: str = profile.recipe.profile.estimator
    return wanted if wanted in OF_FORMATS else "fisher"


def choose_copy_picks(costs: CopyCosts, count: int, seed: int) -> list[CopyPick]:
    """Draws distinct copies, every layer equally often as far as that goes; each has its best head map.

    Args:
        costs: of all pairs.
        count: pairs; all of them, if there are fewer.
        seed: of the draw.
    """
    pairs = np.argwhere(costs.may)
    left = [tuple(pairs[place].tolist()) for place in np.random.default_rng(seed).permutation(len(pairs))]
    seen: Counter[int] = Counter()
    picks: list[CopyPick] = []
    while left and len(picks) < count:
        layer, index = min(left, key=lambda pair: seen[pair[0]])
        seen[layer] += 1
        left.remove((layer, index))
        picks.append((layer, costs.share(layer, layer - 1 - index)))
    return picks


def copy_plans(profile: Profile, picks: Sequence[CopyPick]) -> list[Plan]:
    """Returns the plan of every pick; all other layers are dense."""
    full, layers = Plan.full(profile.shape), range(profile.shape.layers)
    return [replace(full, shares=tuple(share if at == layer else None for at in layers)) for layer, share in picks]


def assess_copies(
    profile: Profile, costs: CopyCosts, picks: Sequence[CopyPick], measured: Floats, seed: int
) -> dict[str, Any]:
    """Compares what copies are predicted to cost with what they cost.

    Args:
        profile: of the dense model.
        costs: as predicted.
        picks: what was measured.
        measured: harms, nats, `[picks]`.
        seed: of the bootstrap.

    Returns:
        `audit_sharing`: `estimator`, and what `rank_and_ratio` says; `sharing_points`: each pick, `layer, anchor, head_map,
        predicted, measured`.
    """
    plans = copy_plans(profile, picks)
    predicted = np.array([costs.cost(plan.shares) for plan in plans])
    points = [
        {"layer": layer, "anchor": share.anchor, "head_map": list(share.head_map), "predicted": guess, "measured": harm}
        for (layer, share), guess, harm in zip(picks, predicted.tolist(), measured.tolist(), strict=True)
    ]
    return {
        "audit_sharing": {"estimator": copy_estimator(profile), **rank_and_ratio(predicted, measured, seed)},
        "sharing_points": points,
    }
