"""What a model keeps of what the dense model can do."""

from __future__ import annotations

from collections.abc import Sequence

from moacompress.core.statistics import Interval, rate


def retained(dense: Sequence[float], model: Sequence[float]) -> list[float]:
    """Returns exact match of a model on the prompts that dense gets fully right; arguments as of `retention`."""
    return [ours for theirs, ours in zip(dense, model, strict=True) if theirs == 1.0]


def retention(dense: Sequence[float], model: Sequence[float]) -> tuple[float, Interval | None, int] | None:
    """Returns what a model keeps of what dense can do.

    Args:
        dense: exact match of the dense model, one for each prompt.
        model: of the other model on the same prompts, in the same order.

    Returns:
        The model's mean exact match on the prompts that dense gets fully right, its interval as in `rate`, and the
        number of these prompts; None where there are none.
    """
    kept = retained(dense, model)
    return (*rate(kept), len(kept)) if kept else None
