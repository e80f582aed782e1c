"""What the KV cache of requests takes, and how many of them fit: known from a model's shape before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule

SHARES = (0.5, 0.25, 0.125)
"""Of the dense bytes: budgets whose bytes are stated where there is no plan yet."""
CACHES = ("int8", "int4")
"""Formats of a cache that keeps everything, in fewer bits."""


def kv_memory(
    shape: ModelShape,
    lengths: Sequence[int],
    batches: Sequence[int],
    *,
    weights: int | None,
    available: int,
    plan: Plan | None = None,
) -> dict[str, Any]:
    """Returns the KV bytes of every length and batch, and how many requests of each length fit beside the weights.

    Args:
        shape: the model; its native windows are respected.
        lengths: tokens of a request.
        batches: requests at a time.
        weights: bytes that the weights take; None where that is not known.
        available: bytes of memory that a process can take.
        plan: stands for the budgets `SHARES`.

    Returns:
        `dtype`, `weights`, `available`; and `rows`: for each length `length`, `kv_bytes`: by batch the bytes of the `dense`
        cache, of caches in `CACHES`, and of the `plan` or of each budget such as `25%`; and `requests`: for each of these how
        many fit, None where the weights' bytes are not known.
    """
    whole = {name: Plan.uniform(shape, Rule.FULL.in_formats(name, name)) for name in CACHES}
    rows = []
    for n in lengths:
        dense = shape.dense_kv_bytes(n)
        one = {"dense": dense, **{name: of.kv_bytes(n) for name, of in whole.items()}}
        one |= {"plan": plan.kv_bytes(n)} if plan else {f"{100 * share:g}%": int(dense * share) for share in SHARES}
        free = None if weights is None else max(available - weights, 0)
        rows.append(
            {
                "length": n,
                "kv_bytes": {str(batch): {name: batch * size for name, size in one.items()} for batch in batches},
                "requests": {name: None if free is None else free // size for name, size in one.items()},
            }
        )
    return {"dtype": shape.dtype, "weights": weights, "available": available, "rows": rows}
