"""The rest: what is left of the budget is spent."""

from __future__ import annotations

from moacompress.search.search_context import SearchContext
from moacompress.search.standing import Standing
from moacompress.search.trials import log_ratio, log_ratios, standard_error


def spend_rest(standing: Standing, context: SearchContext) -> Standing:
    """Spends what is left of the budget: what interactions and moves gave back, and what another length left over.

    No KV head then takes fewer bytes at any length of the budget, and some take more. What the validation samples do not ask
    for may need it, so it stays unless they say that it is worse, by more than the standard error of their paired differences.

    Args:
        standing: measured.
        context: its surrogate says where the rest goes.
    """
    space = context.request.space(standing.plan.shares)
    filled = space.knapsack.filled(space.costs(context.surrogate.costs()), space.choice(standing.plan))
    plan = space.plan(filled)
    if plan.key() == standing.plan.key() or context.deadline.over():
        return standing
    found = context.measured(standing, plan, "rest")
    kept = log_ratio(found.harms, standing.harms) <= standard_error(log_ratios(found.harms, standing.harms))
    context.add_stage("rest", found, kept, standing.harms, 1.0)
    return found if kept else standing
