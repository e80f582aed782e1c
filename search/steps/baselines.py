"""The baselines: plans that need no search are measured."""

from __future__ import annotations

from moacompress.search.baselines.measured import families_of, measure_baseline_families
from moacompress.search.search_context import Incumbent, SearchContext


def measure_baselines(incumbent: Incumbent, context: SearchContext) -> Incumbent:
    """Measures the best plan of every family of baselines, where the recipe asks for them; the incumbent stays.

    What other workers are measuring is not waited for yet: the trials need none of it.

    Raises:
        TimeUp: the time was up before all of them were measured.
    """
    return _measured(incumbent, context, wait=False)


def complete_baselines(incumbent: Incumbent, context: SearchContext) -> Incumbent:
    """Waits for the baselines that other workers were measuring; the incumbent stays.

    Raises:
        TimeUp: the time was up before all of them were measured.
    """
    return incumbent if context.baselines_complete else _measured(incumbent, context, wait=True)


def _measured(incumbent: Incumbent, context: SearchContext, wait: bool) -> Incumbent:
    request = context.request
    if not request.recipe.search.alternatives:
        return incumbent
    families, found = families_of(request), {}
    for family, best in measure_baseline_families(request, context.evaluator, context.progress, wait=wait):
        found[family] = best
        ordered = [(name, found.get(name)) for name in families]
        context.measured_baselines = {name: one for name, one in ordered if one is not None}
    context.baselines_complete = len(found) == len(families)
    return incumbent
