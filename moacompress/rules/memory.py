"""Weights and the KV cache in memory together: how many requests fit, and what a plan's notes say of a budget of memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moacompress.rules.budget import format_length
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.untrusted import reading_notes

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

    It follows from a model's shape, before anything is loaded. `weights` are their bytes, None where that is not known, and
    `available` those that a process can take.

    Returns:
        `dtype`, `weights`, `available`; and `rows`: for each length `length`, `kv_bytes`: by batch the bytes of the `dense`
        cache, of caches in `CACHES`, and of the `plan` or, without one, of each budget of `SHARES` such as `25%`; and
        `requests`: for each of these how many fit, None where the weights' bytes are not known.
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


@reading_notes("memory")
def plan_memory(plan: Plan) -> dict[str, dict[str, int]]:
    """Returns what weights and cache take by length, as a plan's notes have it; of a healed checkpoint as they are now."""
    healed = plan.provenance.get("heal")
    sizes = healed.get("weight_bytes") if isinstance(healed, dict) else None
    now = {"weights": sum(sizes["after"].values())} if isinstance(sizes, dict) else {}
    return {length: {**row, **now} for length, row in plan.budget.get("memory", {}).items()}


def memory_lines(memory: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Returns a sentence for each length of a plan's notes, whose rows have `limit`, `weights` and `kv_bytes`."""
    lines = []
    for length, row in memory.items():
        total, limit = row["weights"] + row["kv_bytes"], row["limit"]
        of_limit = f"of the {limit:,} asked for"
        if total > limit:
            of_limit = f"where {limit:,} were asked for: weights that were trained are numbers again"
        lines.append(
            f"Memory at {format_length(int(length))} tokens: weights {row['weights']:,} bytes and KV cache "
            f"{row['kv_bytes']:,}, {total:,} {of_limit}."
        )
    return lines
