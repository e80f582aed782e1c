"""The baselines: plans that need no search are measured beside the one that was found."""

from __future__ import annotations

from moacompress.search.baselines.measured import families_of, measure_baseline_families
from moacompress.search.measure.plan_evaluator import MeasuredPlan
from moacompress.search.search_context import Incumbent, SearchContext


def measure_baselines(incumbent: Incumbent, context: SearchContext) -> Incumbent:
    """Measures the best plan of every family of baselines, where the recipe asks for them; the incumbent stays.

    Raises:
        TimeUp: the time was up before all of them were measured.
    """
    request = context.request
    if not request.recipe.search.alternatives:
        return incumbent
    found: dict[str, MeasuredPlan | None] = {}
    for family, best in measure_baseline_families(request, context.evaluator, incumbent.kls, context.progress):
        found[family] = best
        ordered = [(name, found.get(name)) for name in families_of(request)]
        context.measured_baselines = {name: one for name, one in ordered if one is not None}
    return incumbent
