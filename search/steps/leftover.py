"""The rest: what is left of the budget is spent."""

from __future__ import annotations

from moacompress.search.measure.kl_difference import KlDifference
from moacompress.search.search_context import Incumbent, SearchContext

REST_CAUTION = 1.0
"""Standard errors by which the plan before must be lower for the rest to be left."""


def spend_leftover(incumbent: Incumbent, context: SearchContext) -> Incumbent:
    """Spends what interactions gave back, and what another length left over, where the surrogate says.

    No KV head then takes fewer bytes at any length of the budget, and some take more. What the validation samples do not ask
    for may need it, so it stays unless they say that it is worse, by more than the standard error of the paired difference.
    """
    space = context.request.space(incumbent.plan.shares)
    filled = space.knapsack.filled(space.costs(context.request.surrogate.costs()), space.choice(incumbent.plan))
    plan = space.plan(filled)
    if plan.key() == incumbent.plan.key() or context.deadline.over():
        return incumbent
    found = context.measured(incumbent, plan, "rest")
    kept = not KlDifference.of(incumbent.kls, found.kls).is_lower(REST_CAUTION)
    context.add_stage("rest", found, kept, incumbent.kls)
    return found if kept else incumbent
