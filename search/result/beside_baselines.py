"""Whether the plan that was found is better than what needs no search, and which of the two is saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moacompress.rules.rule_classes import classes_of
from moacompress.search.measure.kl_difference import KlDifference
from moacompress.search.measure.plan_evaluator import MeasuredPlan

SMALLER = 0.99
"""Share of the found plan's bytes below which a baseline counts as smaller: of one budget all take nearly the same."""


@dataclass(frozen=True)
class BesideBaseline:
    """The plan that was found, and the baseline of lowest mean KL among those that may be saved, or else among all.

    Attributes:
        family: of the baseline.
        baseline: its plan, measured.
        found: the best plan of the search.
        difference: the found plan's KL less the baseline's.
        bytes_share: KV bytes of the baseline as a share of the found plan's.
        allowed: whether it may be saved: it has no more classes of KV heads than were asked for.
    """

    family: str
    baseline: MeasuredPlan
    found: MeasuredPlan
    difference: KlDifference
    bytes_share: float
    allowed: bool

    @staticmethod
    def of(
        found: MeasuredPlan,
        baselines: Mapping[str, MeasuredPlan],
        length: int,
        most: int | None,
        among: Iterable[Sequence[float]] = (),
    ) -> BesideBaseline | None:
        """Compares the best plan of a search with the best of the baselines, by family; None where none was measured.

        Their bytes are compared at `length` tokens. A plan may have `most` classes of KV heads, or any number; `among` are
        the KLs of the plans that the best one was chosen among.
        """
        if not baselines:
            return None
        allowed = {name: one for name, one in baselines.items() if most is None or len(classes_of(one.plan)) <= most}
        family, best = min((allowed or baselines).items(), key=lambda item: item[1].kl)
        return BesideBaseline(
            family,
            best,
            found,
            KlDifference.of(found.kls, best.kls, among),
            best.plan.kv_bytes(length) / found.plan.kv_bytes(length),
            bool(allowed),
        )

    @property
    def better(self) -> bool:
        """Whether a test says that the baseline is lower."""
        return self.difference.verdict == "worse"

    @property
    def saved(self) -> bool:
        """Whether the baseline's plan is saved: it is better, or no worse and smaller."""
        smaller = self.bytes_share <= SMALLER and self.baseline.kl <= self.found.kl
        return self.allowed and (self.better or smaller)

    def to_dict(self) -> dict[str, Any]:
        """Returns what a plan's notes say of it: the `verdict` on the found plan is `better`, `alike` or `worse`."""
        return {
            "family": self.family,
            "harm": self.baseline.kl,
            "found_harm": self.found.kl,
            "difference": self.difference.to_dict(),
            "bytes_share": self.bytes_share,
            "verdict": self.difference.verdict,
            "saved": self.saved,
        }
