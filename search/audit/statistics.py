"""What an audit says in numbers: rank correlation, ratio and regret of predicted against measured KL.

Ablations and plans are drawn at random and are the points that intervals resample, every estimator's alike, so that
differences are paired. A number that cannot be had (too few points, all equal) is NaN; an interval that cannot be had is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from moacompress.core.arrays import Floats, Ints
from moacompress.core.statistics import Resampled
from moacompress.search.problem.knapsack import Pick, total_cost

FLOOR = 1e-12
"""Nats below which a KL or a prediction is numerical noise."""
RATIOS = (0.1, 0.9)
"""Quantiles between which most ratios of measured to predicted KL are."""


def spearman(predicted: Floats, measured: Floats, seed: int) -> Resampled:
    """Returns Spearman's rank correlation over the points, ties at their mean rank; the seed is of the bootstrap."""

    def of(drawn: Ints) -> Floats:  # of all resamples at once: scipy's spearmanr takes one pair a call
        return _correlation(*(rankdata(values[drawn], axis=1) for values in (predicted, measured)))

    return Resampled.of(len(predicted), seed, of)


def regret(predicted: Floats, measured: Floats) -> float:
    """Returns how much higher the KL of the plan of lowest predicted KL is than that of the best, as a share of the best's.

    It has no interval: the least of some points is not resampled truly, and percentiles covered .85 of 40 plans, .77 of 10.
    """
    # below the noise a KL says nothing
    return float(max(measured[predicted.argmin()], FLOOR) / max(measured.min(), FLOOR) - 1)


def rank_and_ratio(predicted: Floats, measured: Floats, seed: int) -> dict[str, Any]:
    """Returns how close predictions are, nats.

    `spearman, ci95`, the median `ratio` of measured to predicted KL, `ratio_range` that four fifths of them are in, `n`.
    """
    return _row(spearman(predicted, measured, seed), predicted, measured)


def _row(rank: Resampled, predicted: Floats, measured: Floats) -> dict[str, Any]:
    usable = (predicted > FLOOR) & (measured > FLOOR)
    ratios = measured[usable] / predicted[usable]
    middle, low, high = np.quantile(ratios, (0.5, *RATIOS)).tolist() if len(ratios) else (float("nan"),) * 3
    return {
        "spearman": rank.value,
        "ci95": rank.ci95,
        "ratio": middle,
        "ratio_range": [low, high],
        "n": len(predicted),
    }


def _correlation(x: Floats, y: Floats) -> Floats:
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    under = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    found = np.full(len(under), np.nan)
    np.divide((x * y).sum(axis=1), under, out=found, where=under > 1e-20)
    return found


@dataclass(frozen=True)
class Assessment:
    """What measurements say of estimators; the rows are those of `Audit`.

    Attributes:
        correlations: Spearman's of every estimator, over the ablations.
        ablations: by estimator.
        plans: by estimator; empty without plans.
        points: of every ablation; `rule` by number.
        plan_points: of every plan.
    """

    correlations: dict[str, Resampled]
    ablations: dict[str, dict[str, Any]]
    plans: dict[str, dict[str, Any]]
    points: list[dict[str, Any]]
    plan_points: list[dict[str, Any]]


def assess(
    influence: Mapping[str, Floats],
    picks: Sequence[Pick],
    measured: Floats,
    choices: Sequence[Ints],
    measured_plans: Floats,
    seed: int,
) -> Assessment:
    """Compares what estimators predict with what was measured.

    Args:
        influence: by estimator, [layers, kv_heads, rules].
        picks: the ablations.
        measured: their KL, nats, [ablations].
        choices: the plans, int64 [layers, kv_heads] each.
        measured_plans: their KL, nats, [plans].
        seed: of the bootstrap.
    """
    found = Assessment({}, {}, {}, [], [])
    for (layer, head, rule), kl in zip(picks, measured.tolist(), strict=True):
        place = {"layer": layer, "kv_head": head, "rule": rule, "measured": kl}
        found.points.append({**place, "predicted": {}})
    found.plan_points.extend({"measured": kl, "predicted": {}} for kl in measured_plans.tolist())
    for name, table in influence.items():
        predicted = np.array([table[pick] for pick in picks])
        found.correlations[name] = spearman(predicted, measured, seed)
        found.ablations[name] = _row(found.correlations[name], predicted, measured)
        for point, kl in zip(found.points, predicted.tolist(), strict=True):
            point["predicted"][name] = kl
        if not len(choices):
            continue
        totals = np.array([total_cost(table, choice) for choice in choices])
        found.plans[name] = {**rank_and_ratio(totals, measured_plans, seed), "regret": regret(totals, measured_plans)}
        for point, kl in zip(found.plan_points, totals.tolist(), strict=True):
            point["predicted"][name] = kl
    return found
