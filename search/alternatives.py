"""Plans that need no search, measured beside the found one on the same samples, each family at its best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moacompress.plan import Plan
from moacompress.progress import Progress
from moacompress.search.baselines import FAMILIES, family_plans
from moacompress.search.request import Request

SCREENED = 3
"""Samples on which all candidates of a family are measured."""
FINALISTS = 2
"""Candidates of a family that are measured on all samples: the best of the screening."""
CANDIDATES = 6
"""Candidates of a family, those predicted to be best first."""

Measured = Callable[[str, Plan, Sequence[int]], list[float]]
"""Harms of a plan on numbered samples, in nats; the text says what they are measured for."""


@dataclass(frozen=True)
class Alternative:
    """The best candidate of a family.

    Attributes:
        plan: the plan.
        harm: its mean harm on all samples, nats.
    """

    plan: Plan
    harm: float


def measure_alternatives(
    request: Request, order: Sequence[int], measured: Measured, progress: Progress
) -> dict[str, Alternative]:
    """Returns the best candidate of every family that has one within the request's limits.

    Args:
        request: what is searched for.
        order: all samples, by number.
        measured: measures.
        progress: told of every measurement.
    """
    profile = request.profile
    sinks = sorted({rule.sink for rule in profile.rules if not rule.is_full})
    field = {
        family: family_plans(family, profile.shape, request.limits, profile, sinks)[:CANDIDATES] for family in FAMILIES
    }
    progress.start("measuring alternatives", sum(len(plans) + min(len(plans), FINALISTS) for plans in field.values()))
    found = {}
    for family, plans in field.items():
        screened = []
        for plan in plans:
            screened.append(float(np.mean(measured("screening", plan, order[:SCREENED]))))
            progress.step(f"{family}: {screened[-1]:.3g} nats")
        finalists = [plans[index] for index in np.argsort(screened, kind="stable")[:FINALISTS]]
        best: Alternative | None = None
        for plan in finalists:
            first, rest = measured("screening", plan, order[:SCREENED]), measured("finalist", plan, order[SCREENED:])
            harm = float(np.mean([*first, *rest]))
            progress.step(f"{family}: {harm:.3g} nats")
            if best is None or harm < best.harm:
                best = Alternative(plan, harm)
        if best is not None:
            found[family] = best
    progress.done()
    return found
