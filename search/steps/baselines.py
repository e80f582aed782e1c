"""The baselines: plans that need no search, measured beside whatever the steps after this one find."""

from __future__ import annotations

from moacompress.search.baselines.measured import measure_baseline_families
from moacompress.search.incumbent import Incumbent
from moacompress.search.search_context import SearchContext


def measure_baselines(incumbent: Incumbent, context: SearchContext) -> Incumbent:
    """Measures the best plan of every family of baselines, where the recipe asks for them.

    Args:
        incumbent: is returned as it is.
        context: its `alternatives` are filled, one family after the other.

    Raises:
        TimeUp: the time was up before all of them were measured.
    """
    if context.request.recipe.search.alternatives:
        for family, best in measure_baseline_families(context.request, context.evaluator, context.progress):
            context.measured_baselines[family] = best
    return incumbent
