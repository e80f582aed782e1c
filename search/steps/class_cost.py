"""What a limit of classes costs: the best trial's plan beside the one that its search parameters give without the limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moacompress.rules.plan import Plan
from moacompress.rules.rule_classes import classes_of
from moacompress.search.measure.kl_difference import KlDifference
from moacompress.search.measure.packed_plan import unpack
from moacompress.search.measure.trials import best_trial
from moacompress.search.search_context import Incumbent, SearchContext


def measure_class_cost(incumbent: Incumbent, context: SearchContext) -> Incumbent:
    """Measures the plan without the limit, where there is one, and fills the context's `class_cost`; the incumbent stays.

    Like the other plans that are only compared with, it is left out where the recipe asks for no alternatives.

    Raises:
        TimeUp: the time was up before all samples were measured.
    """
    request = context.request
    search = request.recipe.search
    if search.classes is None or not search.alternatives:
        return incumbent
    best = best_trial(context.tried)
    limited = unpack(best.plan, request.profile)
    unlimited, kls = request.of_any_classes().plan(best.parameters), best.kls
    if unlimited.key() != limited.key():
        kls = context.evaluator.shown("unlimited", unlimited, "measuring the plan without a class limit")

    def noted(plan: Plan, kls: Sequence[float]) -> dict[str, Any]:
        predicted = request.predicted(plan)
        return {"classes": len(classes_of(plan)), "predicted_harm": predicted, "harm": float(np.mean(kls))}

    context.class_cost = {
        "trial": best.index,
        "limited": noted(limited, best.kls),
        "unlimited": noted(unlimited, kls),
        "difference": KlDifference.of(best.kls, kls).to_dict(),
    }
    return incumbent
