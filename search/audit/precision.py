"""The audit of formats: one KV head's keys or values are kept in one format, all else is dense, predicted against measured.

KLs of single KV heads in 8 bits are far below what bfloat16 resolves: they want a model in float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from moacompress.calibration.profile.statistics import ROBUST, SIDES
from moacompress.calibration.profile.store import Profile
from moacompress.core.arrays import Floats
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.search.audit.statistics import rank_and_ratio
from moacompress.search.problem.knapsack import Pick, ablation


class FormatPick(NamedTuple):
    """One KV head whose keys or whose values have a format."""

    layer: int
    kv_head: int
    side: str
    format: str

    @property
    def kind(self) -> str:
        """What is rounded and how, such as `int4 keys`."""
        return f"{self.format} {self.side}s"

    @property
    def rule(self) -> Rule:
        """The KV head's rule: it keeps every token."""
        return (
            replace(Rule.FULL, key_format=self.format)
            if self.side == "key"
            else replace(Rule.FULL, value_format=self.format)
        )

    def among(self, profile: Profile) -> Pick:
        """Returns the pick by the number of its rule among those of a profile that offers the format."""
        return self.layer, self.kv_head, profile.rules.index(self.rule)


def choose_format_picks(profile: Profile, count: int, seed: int) -> list[FormatPick]:
    """Draws distinct picks, all if there are fewer than `count`: layers, KV heads and kinds equally often, if possible."""
    every = [
        FormatPick(layer, head, side, name)
        for layer, head in np.ndindex(profile.shape.layers, profile.shape.kv_heads)
        for side in SIDES
        for name in profile.formats
    ]
    left = [every[place] for place in np.random.default_rng(seed).permutation(len(every)).tolist()]
    seen: Counter[object] = Counter()
    picks: list[FormatPick] = []
    while left and len(picks) < count:
        pick = min(left, key=lambda one: (seen[one.kind], seen[one.layer], seen[one.layer, one.kv_head]))
        seen.update([pick.kind, pick.layer, (pick.layer, pick.kv_head)])
        left.remove(pick)
        picks.append(pick)
    return picks


def format_plans(profile: Profile, picks: Sequence[FormatPick]) -> list[Plan]:
    """Returns the plan of every pick; all other KV heads are dense."""
    return [ablation(profile, pick.among(profile)) for pick in picks]


def assess_formats(
    profile: Profile, influence: Mapping[str, Floats], picks: Sequence[FormatPick], measured: Floats, seed: int
) -> dict[str, Any]:
    """Compares what formats are predicted to cost (`influence` by estimator) with the measured KL of every pick, nats.

    Returns `audit_precision`: `estimator, spearman, ci95`, the median `ratio` of measured to predicted KL, `ratio_range` that
    four fifths of them are in, `n`, and the same by `kinds`; and `precision_points`: each pick, `layer, kv_head, side,
    format, predicted, measured`.
    """
    predicted = np.array([influence[ROBUST][pick.among(profile)] for pick in picks])
    kinds = np.array([pick.kind for pick in picks])
    by_kind = {
        kind: rank_and_ratio(predicted[kinds == kind], measured[kinds == kind], seed)
        for kind in dict.fromkeys(kinds.tolist())
    }
    points = [
        {**pick._asdict(), "predicted": guess, "measured": kl}
        for pick, guess, kl in zip(picks, predicted.tolist(), measured.tolist(), strict=True)
    ]
    whole = {"estimator": ROBUST, **rank_and_ratio(predicted, measured, seed), "kinds": by_kind}
    return {"audit_precision": whole, "precision_points": points}
