"""The rest: what is left of the budget is spent."""

from __future__ import annotations

from moacompress.search.measure.trials import log_ratio, log_ratios, standard_error
from moacompress.search.search_context import Incumbent, SearchContext


def spend_leftover(incumbent: Incumbent, context: SearchContext) -> Incumbent:
    """Spends what is left of the budget: what interactions and moves gave back, and what another length left over.

    No KV head then takes fewer bytes at any length of the budget, and some take more. What the validation samples do not ask
    for may need it, so it stays unless they say that it is worse, by more than the standard error of their paired differences.

    Args:
        incumbent: measured.
        context: its surrogate says where the rest goes.
    """
    space = context.request.space(incumbent.plan.shares)
    filled = space.knapsack.filled(space.costs(context.surrogate.costs()), space.choice(incumbent.plan))
    plan = space.plan(filled)
    if plan.key() == incumbent.plan.key() or context.deadline.over():
        return incumbent
    found = context.measured(incumbent, plan, "rest")
    kept = log_ratio(found.kls, incumbent.kls) <= standard_error(log_ratios(found.kls, incumbent.kls))
    context.add_stage("rest", found, kept, incumbent.kls, 1.0)
    return found if kept else incumbent
