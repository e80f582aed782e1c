"""Cost tables of machines whose times are known: what a fit must find, and what a search is given in tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moacompress.bench.cost_table import probes
from moacompress.estimate.machine import this_machine
from moacompress.rules.cost_table import FORMAT, VERSION, CostTable, head_groups
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan

BASES = {"native": 0.0, "int8": 400.0, "int4": 900.0}
"""Nanoseconds of a KV head's keys, or of its values."""
SLOPES = {"native": 10.0, "int8": 6.0, "int4": 4.0}
"""Nanoseconds of each token of a row, for each row."""
GATE = (2_000.0, 3.0)
FLOOR = 2e5
"""Nanoseconds of a step that keeps nothing."""


def known_ns(plan: Plan, length: int, rows: int) -> float:
    """Returns what a step takes on the machine that is known, nanoseconds."""
    total = FLOOR
    for group in head_groups(plan, length):
        total += group.heads * (BASES[group.key_format] + BASES[group.value_format])
        total += group.slots * rows * (SLOPES[group.key_format] + SLOPES[group.value_format])
        total += group.gated * (group.heads * GATE[0] + group.selected * rows * GATE[1])
    return total


def known_table(
    shape: ModelShape, lengths: Sequence[int], rows: Sequence[int], noise: float = 0.0, **configuration: Any
) -> dict[str, Any]:
    """Returns the JSON form of the table that is measured on the machine that is known, here.

    Args:
        shape: of the model.
        lengths: tokens.
        rows: of the batch.
        noise: relative, of every time.
        **configuration: what else it was measured with.
    """
    random = np.random.default_rng(0)
    cells = []
    for length in lengths:
        for count in rows:
            points = []
            for probe in probes(shape, 8, length, 0):
                ms = known_ns(probe.plan, length, count) / 1e6 * (1 + noise * float(random.normal()))
                groups = [group.model_dump(mode="json") for group in head_groups(probe.plan, length)]
                points.append({"name": probe.name, "use": probe.use, "ms": ms, "spread_ms": [ms, ms], "groups": groups})
            cells.append({"length": length, "rows": count, "load_per_core": None, "points": points})
    return {
        "format": FORMAT,
        "version": VERSION,
        "measured": "2026-01-01T00:00:00+00:00",
        "configuration": {
            **this_machine("cpu", shape.dtype).__dict__,
            "model": shape.to_dict(),
            "weights": "keep",
            "head_weights": None,
            "weight_bytes": 1000,
            "lengths": list(lengths),
            "rows": list(rows),
            "tokens": 4,
            "repeats": 9,
            "seed": 0,
            "torch": "2",
            "moacompress": "0",
            **configuration,
        },
        "cells": cells,
    }


def read(data: dict[str, Any]) -> CostTable:
    """Returns the table of a JSON form."""
    return CostTable.from_dict(data)
