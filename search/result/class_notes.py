"""What a plan says of its classes of KV heads, and of what the limit on their number costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moacompress.rules.plan import Plan
from moacompress.rules.rule_classes import classes_of
from moacompress.search.measure.kl_difference import KlDifference


@dataclass(frozen=True)
class Compared:
    """One of two plans that are compared.

    Attributes:
        classes: that it has.
        predicted: KL, nats; None where a rule of it is no candidate.
        kls: measured, nats, in the order of the shuffled samples.
    """

    classes: int
    predicted: float | None
    kls: Sequence[float]

    @staticmethod
    def of(plan: Plan, predicted: float | None, kls: Sequence[float]) -> Compared:
        """Returns a plan as it is compared."""
        return Compared(len(classes_of(plan)), predicted, kls)

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON values, where the KL is called `harm`."""
        return {"classes": self.classes, "predicted_harm": self.predicted, "harm": float(np.mean(self.kls))}


@dataclass(frozen=True)
class ClassCost:
    """What the limit costs: two plans of the same search parameters, with the limit and without.

    Attributes:
        trial: whose search parameters they are.
        limited: its plan.
        unlimited: the other one.
    """

    trial: int
    limited: Compared
    unlimited: Compared


def class_quality(most: int | None, plan: Plan, cost: ClassCost | None = None) -> dict[str, Any]:
    """Returns what a plan's notes on quality say of its classes, as JSON values; nothing where their number had no limit.

    Args:
        most: classes that were allowed.
        plan: the plan.
        cost: of the limit; None where it is not measured.

    Returns:
        `classes`: `most`, and the number that the `plan` has. Where the limit's cost was measured, also `trial`, and of the
        plans with its search parameters, `limited` and `unlimited`, their `classes`, `predicted_harm` and measured `harm`,
        nats; and the paired `difference` of the limited plan's measured KL to the other's.
    """
    if most is None:
        return {}
    notes: dict[str, Any] = {"most": most, "plan": len(classes_of(plan))}
    if cost is not None:
        notes |= {
            "trial": cost.trial,
            "limited": cost.limited.to_dict(),
            "unlimited": cost.unlimited.to_dict(),
            "difference": KlDifference.of(cost.limited.kls, cost.unlimited.kls).to_dict(),
        }
    return {"classes": notes}
