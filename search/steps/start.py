"""The start: the surrogate is calibrated by measured ablations, and plans that need no search are measured."""

from __future__ import annotations

from moacompress.search.baselines.measured import measure_baseline_families
from moacompress.search.search_context import Incumbent, SearchContext


def calibrate(incumbent: Incumbent, context: SearchContext) -> Incumbent:
    """Calibrates the surrogate and returns its plan, which is not measured yet.

    Args:
        incumbent: of the surrogate as it was.
        context: its `surrogate` becomes the calibrated one.

    Raises:
        TimeUp: the time was up before all ablations were measured.
    """
    context.surrogate = context.evaluator.calibrated(context.request, context.progress)
    return context.start()


def measure_baselines(incumbent: Incumbent, context: SearchContext) -> Incumbent:
    """Measures the best plan of every family of baselines, where the recipe asks for them.

    Args:
        incumbent: is returned as it is.
        context: its `measured_baselines` are filled, one family after the other.

    Raises:
        TimeUp: the time was up before all of them were measured.
    """
    if context.request.recipe.search.alternatives:
        for family, best in measure_baseline_families(context.request, context.evaluator, context.progress):
            context.measured_baselines[family] = best
    return incumbent
