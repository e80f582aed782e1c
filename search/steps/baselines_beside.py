"""The baselines: plans that need no search, measured beside whatever the steps after this one find."""

from __future__ import annotations

from moacompress.search.alternatives import measure_alternatives
from moacompress.search.search_context import SearchContext
from moacompress.search.standing import Standing


def measure_baselines(standing: Standing, context: SearchContext) -> Standing:
    """Measures the best plan of every family of baselines, where the recipe asks for them.

    Args:
        standing: is returned as it is.
        context: its `alternatives` are filled, one family after the other.

    Raises:
        TimeUp: the time was up before all of them were measured.
    """
    if context.request.recipe.search.alternatives:
        for family, best in measure_alternatives(context.request, context.meter, context.progress):
            context.alternatives[family] = best
    return standing
