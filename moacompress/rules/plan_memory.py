"""What the weights and the cache of a plan take together, as its notes have it."""

from __future__ import annotations

from collections.abc import Mapping

from moacompress.rules.budget import format_length
from moacompress.rules.plan import Plan
from moacompress.rules.untrusted import reading_notes


@reading_notes("memory")
def plan_memory(plan: Plan) -> dict[str, dict[str, int]]:
    """Returns what weights and cache take by length, as `memory_lines` takes it; of a healed checkpoint as they are now."""
    healed = plan.provenance.get("heal")
    sizes = healed.get("weight_bytes") if isinstance(healed, dict) else None
    now = {"weights": sum(sizes["after"].values())} if isinstance(sizes, dict) else {}
    return {length: {**row, **now} for length, row in plan.budget.get("memory", {}).items()}


def memory_lines(memory: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Returns what weights and cache take, a sentence for each length that a budget of memory names.

    Args:
        memory: as a plan's notes have it: bytes by length, `limit`, `weights` and `kv_bytes`.
    """
    return [
        f"Memory at {format_length(int(length))} tokens: weights {row['weights']:,} bytes and KV cache {row['kv_bytes']:,}, "
        f"{row['weights'] + row['kv_bytes']:,} {_of_limit(row)}."
        for length, row in memory.items()
    ]


def _of_limit(row: Mapping[str, int]) -> str:
    if row["weights"] + row["kv_bytes"] > row["limit"]:
        return f"where {row['limit']:,} were asked for: weights that were trained are numbers again"
    return f"of the {row['limit']:,} asked for"
