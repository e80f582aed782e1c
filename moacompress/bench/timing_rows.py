"""What was measured, as rows: medians, spreads, speed-ups with intervals, and from which length on a plan is faster.

A speed-up is the median over the turns of the ratio within a turn, never the ratio of two medians: sides of one turn meet the
same load. All that says which side is faster goes by it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moacompress.bench.bench_request import SIDES, Cell
from moacompress.bench.graphs import Proof
from moacompress.bench.sides import STATIC
from moacompress.core.statistics import estimate_row, median
from moacompress.rules.budget import format_length
from moacompress.rules.cost import kept_bits
from moacompress.rules.plan import Plan

TimingRow = dict[str, Any]
COMPILED_NAME = "static cache, compiled"
BASELINES = ("dense", "dense_best")


def best_dense(measured: Mapping[str, Any]) -> tuple[str, str | None]:
    """Returns which of the dense sides is the fastest, and why the compiled one is not in question, if so."""
    refused = measured.get("refused", {}).get(STATIC)
    seconds = measured["seconds"]
    if refused is None and STATIC in seconds:
        refused = Proof(**measured["proofs"][STATIC]).problem
    if refused is not None or STATIC not in seconds:
        return "dense", refused
    return min(("dense", STATIC), key=lambda side: statistics.median(seconds[side])), None


def make_row(
    phase: str, cell: Cell, measured: Mapping[str, Any], peaks: Mapping[str, Mapping[str, int]], plan: Plan, steps: int
) -> TimingRow:
    """Returns one row of `runs`, of the phase "decode" or "prefill".

    A turn has so many `steps`: tokens decoded, 1 for a prefill. `peaks` has by side what `peak.peak_bytes` found.
    """
    seconds = dict(measured["seconds"])
    best, refused = best_dense(measured) if "dense" in seconds else (None, None)
    if best is not None and "dense_best" in measured["sides"]:
        seconds["dense_best"] = seconds[best]
    shown = {
        side: seconds[side] for side in (*SIDES, STATIC) if side in seconds and side in (*measured["sides"], STATIC)
    }
    ms = {side: [value / steps * 1e3 for value in times] for side, times in shown.items()}
    tokens = cell.batch * (1 if phase == "decode" else cell.length)
    plan = plan.in_dtype(cell.dtype)
    dense_kv = plan.model.dense_kv_bytes(cell.length, cell.batch)
    plan_kv = measured["kv_bytes"].get("plan", plan.kv_bytes(cell.length, cell.batch))
    weights = measured["weight_bytes"]
    row: TimingRow = {"phase": phase, "length": cell.length, "batch": cell.batch, "dtype": cell.dtype}
    row |= {f"{side}_ms": statistics.median(ms[side]) if side in ms else None for side in SIDES}
    row |= {
        "dense_best": None if "dense_best" not in ms else COMPILED_NAME if best == STATIC else "dense",
        "dense_best_refused": refused,
        f"{STATIC}_ms": statistics.median(ms[STATIC]) if STATIC in ms else None,
        "spread_ms": {side: [float(q) for q in np.quantile(times, (0.1, 0.9))] for side, times in ms.items()},
        "speedup": _speedups(ms),
        "tokens_per_s": {side: tokens / statistics.median(times) * 1e3 for side, times in ms.items()},
        "repeats": len(next(iter(ms.values()))),
        "kv_bytes_plan": plan_kv,
        "kv_bytes_dense": dense_kv,
        "bits": kept_bits(plan, cell.length),
        "weight_bytes": weights,
        "byte_ratio": (weights + dense_kv) / (weights + plan_kv),
        "peak_bytes_plan": None,
        "peak_bytes_dense": None,
        **{f"peak_bytes_{side}": found[phase] for side, found in peaks.items()},
        "kernel": measured["kernel"],
        "routes": measured["routes"],
        "load_per_core": measured["load_per_core"],
        "compiled": sorted(measured.get("proofs", {})),
        "graphs": measured.get("proofs", {}),
        "trace": measured.get("trace"),
    }
    return row


def _speedups(ms: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Returns how many times as fast a plan is as each other side: the median of the turns' ratios, and its interval."""
    found = {}
    for side, times in ms.items():
        if side == "plan" or "plan" not in ms:
            continue
        ratios = [theirs / ours for theirs, ours in zip(times, ms["plan"], strict=True)]
        found[side] = estimate_row(*median(ratios))
    return found


def break_even(runs: Iterable[TimingRow]) -> list[TimingRow]:
    """Returns from which length on a plan decodes faster, for each batch, dtype and dense side.

    Rows have `batch, dtype, against, length` (tokens, or None), `how` ("measured", "interpolated" or None) and `text`.
    """
    decode = [row for row in runs if row["phase"] == "decode" and row["plan_ms"] is not None]
    found = []
    for dtype, batch in sorted({(str(row["dtype"]), int(row["batch"])) for row in decode}):
        points = [row for row in decode if (row["dtype"], row["batch"]) == (dtype, batch)]
        points.sort(key=lambda row: int(row["length"]))
        for against in BASELINES:
            gaps = [
                (int(row["length"]), row["plan_ms"] * (row["speedup"][against]["value"] - 1))
                for row in points
                if row[f"{against}_ms"] is not None
            ]
            if gaps:
                length, how = first_faster(gaps)
                text = _sentence(length, how, against, gaps)
                found.append(
                    {"batch": batch, "dtype": dtype, "against": against, "length": length, "how": how, "text": text}
                )
    return found


def first_faster(gaps: Sequence[tuple[int, float]]) -> tuple[int | None, str | None]:
    """Returns the length from which on a plan is faster, up to the longest measured, and how that is known.

    `gaps` are lengths, shortest first, each with by how many ms the plan is faster.
    """
    first = len(gaps)
    while first and gaps[first - 1][1] > 0:
        first -= 1
    if first == len(gaps):
        return None, None
    if first == 0:
        return gaps[0][0], "measured"
    (short, slower), (long, faster) = gaps[first - 1 : first + 1]
    return math.ceil(short + (long - short) * -slower / (faster - slower)), "interpolated"


def _sentence(length: int | None, how: str | None, against: str, gaps: Sequence[tuple[int, float]]) -> str:
    name = {"dense": "dense", "dense_best": "the best dense"}[against]
    if length is None:
        return f"not faster than {name} at {format_length(gaps[-1][0])} tokens, the longest measured"
    if how == "measured":
        if len(gaps) == 1:
            return f"faster than {name} at {format_length(length)} tokens, the only length measured"
        return f"faster than {name} at every length measured, from {format_length(length)} tokens on"
    return f"faster than {name} from about {length:,} tokens on (interpolated)"
