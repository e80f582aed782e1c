"""What the KV cache of requests takes and how many of them fit, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType

from moacompress.core.tables import readable_bytes, section
from moacompress.rules.budget import format_length

NAMES = {"dense": "dense", "int8": "8-bit cache, all tokens", "int4": "4-bit cache, all tokens", "plan": "this plan"}


def memory_tables(found: Mapping[str, Any]) -> list[RenderableType]:
    """Returns a table for every length: the KV bytes of each batch, and the requests that fit beside the weights.

    Args:
        found: as `rules.kv_memory.kv_memory` returns it.
    """
    weights = found["weights"]
    room = "" if weights is None else f"{readable_bytes(found['available'])} free, {readable_bytes(weights)} of weights"
    tables: list[RenderableType] = []
    for row in found["rows"]:
        names = list(row["requests"])
        cells = [
            (
                NAMES.get(name, f"plan at {name}"),
                *(readable_bytes(sizes[name]) for sizes in row["kv_bytes"].values()),
                *([f"{row['requests'][name]:,}"] if room else []),
            )
            for name in names
        ]
        batches = [f"batch {batch}" for batch in row["kv_bytes"]]
        title = f"KV cache at {format_length(row['length'])} tokens, {found['dtype']}" + (f" ({room})" if room else "")
        tables.append(section(title, ("", *batches, *(["requests that fit"] if room else [])), cells))
    return tables
