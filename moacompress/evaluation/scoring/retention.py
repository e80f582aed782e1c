"""What a model keeps of what the dense model can do."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

from moacompress.core.statistics import Interval, by_document, rate

T = TypeVar("T")


def retained(dense: Sequence[float], model: Sequence[T]) -> list[T]:
    """Returns what belongs to the prompts that dense gets fully right, such as a model's exact match on them."""
    return [ours for theirs, ours in zip(dense, model, strict=True) if theirs == 1.0]


def retention(
    dense: Sequence[float], model: Sequence[float], documents: Sequence[Hashable] | None = None
) -> tuple[float, Interval | None, int] | None:
    """Returns what a model keeps of what dense can do.

    Args:
        dense: exact match of the dense model, one for each prompt.
        model: of the other model on the same prompts, in the same order.
        documents: what each prompt asks about; those of one document count as one. None where all have their own.

    Returns:
        The model's mean exact match on the prompts that dense gets fully right, its interval as in `rate`, and the
        number of these prompts; None where there are none.
    """
    kept = retained(dense, model)
    if not kept:
        return None
    alone = kept if documents is None else by_document(kept, retained(dense, documents))
    return (*rate(alone), len(kept))
