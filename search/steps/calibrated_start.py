"""The start: measured ablations of single KV heads calibrate the surrogate, whose plan the steps after it begin with."""

from __future__ import annotations

from moacompress.search.incumbent import Incumbent
from moacompress.search.search_context import SearchContext


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
