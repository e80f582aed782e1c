"""The start: measured ablations of single KV heads calibrate the surrogate, whose plan the steps after it begin with."""

from __future__ import annotations

from moacompress.search.search_context import SearchContext
from moacompress.search.standing import Standing


def calibrate(standing: Standing, context: SearchContext) -> Standing:
    """Calibrates the surrogate and returns its plan, which is not measured yet.

    Args:
        standing: of the surrogate as it was.
        context: its `surrogate` becomes the calibrated one.

    Raises:
        TimeUp: the time was up before all ablations were measured.
    """
    context.surrogate = context.meter.calibrated(context.request, context.progress)
    return context.start()
