"""The audit of copies: one layer attends as an earlier one does, by the best head map, and all else is dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile.statistics import ROBUST
from moacompress.calibration.profile.store import Profile
from moacompress.core.arrays import Floats
from moacompress.core.progress import Progress
from moacompress.models.source import SourceModel
from moacompress.repair.copies import repaired_copies
from moacompress.repair.plans import repair_samples
from moacompress.rules.plan import Plan
from moacompress.rules.share import Share
from moacompress.search.audit.statistics import rank_and_ratio
from moacompress.search.measure.measuring import measured_kls
from moacompress.search.sharing.copy_costs import CopyCosts

REPAIRED_PICKS = 24
"""Copies that are repaired and measured again, at most: each fit holds two squares of the projection's inputs."""

CopyPick: TypeAlias = tuple[int, Share]
"""A layer, and its copy."""


def copy_costs(profile: Profile, samples: Sequence[Sample]) -> CopyCosts | None:
    """Returns what copies are predicted to cost on samples like these; None where the profile has none.

    Each sample counts with the influence at the profiled length nearest to its own, of its kind.
    """
    if "copy_squares" not in profile.statistics.arrays:
        return None
    groups = Counter(
        (sample.kind, min(profile.lengths, key=lambda length: abs(length - sample.length))) for sample in samples
    )
    found = {group: CopyCosts.at(profile, *group) for group in groups}
    whole = np.average([costs.influence for costs in found.values()], axis=0, weights=list(groups.values()))
    return replace(next(iter(found.values())), influence=whole)


def choose_copy_picks(costs: CopyCosts, count: int, seed: int) -> list[CopyPick]:
    """Draws `count` distinct copies, or all, layers equally often if possible; each has its best head map."""
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
    """Compares what copies are predicted to cost with the measured KL of every pick, nats.

    Returns `audit_sharing`: `estimator`, and what `rank_and_ratio` says; and `sharing_points`: each pick, `layer, anchor,
    head_map, predicted, measured`.
    """
    predicted = np.array([costs.cost(plan.shares) for plan in copy_plans(profile, picks)])
    return {
        "audit_sharing": {"estimator": ROBUST, **rank_and_ratio(predicted, measured, seed)},
        "sharing_points": _points(picks, predicted, measured),
    }


def audit_repairs(
    profile: Profile,
    model: SourceModel,
    costs: CopyCosts,
    picks: Sequence[CopyPick],
    samples: Sequence[Sample],
    records: Path,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Measures the first `REPAIRED_PICKS` copies with repaired weights, beside what the repairs are predicted to leave.

    The costs are of copies that are not repaired. Returns `audit_repair` and `repair_points`, which are like `audit_sharing`
    and `sharing_points` but have `left` too; nothing where there are no picks.
    """
    picks = picks[:REPAIRED_PICKS]
    if not picks:
        return {}
    shape, plans = profile.shape, copy_plans(profile, picks)
    dtype = getattr(torch, shape.dtype)
    repairs = repaired_copies(model.model, shape, picks, repair_samples(profile, shape), dtype, progress)
    weights = {plan.key(): one.weights for plan, one in zip(plans, repairs, strict=True)}
    kls = measured_kls(
        model, samples, plans, records, progress, lambda plan: weights.get(plan.key(), {}), "repaired"
    ).mean(axis=1)
    predicted = np.array([one.left * costs.cost(plan.shares) for plan, one in zip(plans, repairs, strict=True)])
    points = _points(picks, predicted, kls)
    return {
        "audit_repair": {"estimator": ROBUST, **rank_and_ratio(predicted, kls, seed)},
        "repair_points": [{**point, "left": one.left} for point, one in zip(points, repairs, strict=True)],
    }


def _points(picks: Sequence[CopyPick], predicted: Floats, measured: Floats) -> list[dict[str, Any]]:
    return [
        {"layer": layer, "anchor": share.anchor, "head_map": list(share.head_map), "predicted": guess, "measured": kl}
        for (layer, share), guess, kl in zip(picks, predicted.tolist(), measured.tolist(), strict=True)
    ]
