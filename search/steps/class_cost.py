"""What a limit of classes costs: the best trial's plan beside the one that its search parameters give without the limit."""

from __future__ import annotations

from moacompress.search.measure.packed_plan import unpack
from moacompress.search.measure.trials import best_trial
from moacompress.search.result.class_notes import ClassCost, Compared
from moacompress.search.search_context import Incumbent, SearchContext


def measure_class_cost(incumbent: Incumbent, context: SearchContext) -> Incumbent:
    """Measures the plan without the limit, where there is one, on all validation samples; the incumbent stays.

    Like the other plans that are only compared with, it is left out where the recipe asks for no alternatives.

    Args:
        incumbent: is returned as it is.
        context: its `class_cost` is filled.

    Raises:
        TimeUp: the time was up before all samples were measured.
    """
    request, surrogate = context.request, context.surrogate
    search = request.recipe.search
    if search.classes is None or not search.alternatives:
        return incumbent
    best = best_trial(context.tried)
    limited = unpack(best.plan, request.profile)
    plan = request.of_any_classes().plan(surrogate, best.parameters)
    same = plan.key() == limited.key()
    context.class_cost = ClassCost(
        best.index,
        Compared.of(limited, request.predicted(surrogate, limited), best.kls),
        Compared.of(
            plan,
            request.predicted(surrogate, plan),
            best.kls
            if same
            else context.evaluator.shown("unlimited", plan, "measuring the plan without a class limit"),
        ),
    )
    return incumbent
