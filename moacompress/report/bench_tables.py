"""What a benchmark came to, for people: times, speed-ups and memory, and where the plan is not faster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from moacompress.bench.bench_request import SIDES
from moacompress.core.statistics import estimate_text
from moacompress.core.tables import Row, section
from moacompress.rules.budget import format_length

HEADS = {"plan": "this plan", "full_span": "full span", "dense": "dense", "dense_best": "best dense"}
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
UNITS = {"decode": ("ms a step, in which each row gets one token", 1.0), "prefill": ("seconds, all rows", 1e-3)}
SPEED_TITLE = "This plan is so many times as fast as the others: the median of the turns' ratios, 95% interval"
SPEED_NOTE = "Sides of a turn meet the same load, so ratios are taken turn by turn, not of the medians above."
SLOWER_NOTE = "* The plan is slower here. Where the interval holds 1, that may be chance."
MEMORY_TITLE = "Memory in MiB: weights, KV cache, and the peak of a process with all that is in it"
BITS_NOTE = "Bits: per number in kept keys and values, scales and zero points counted."
CEILING_NOTE = "Ceiling: (weights + dense KV) / (weights + kept KV), the most that fewer bytes can speed a step up."
TRACE_TITLE = "Where a step's time goes under this plan, {cell}: {ms} ms, traced, on {threads}"


def bench_tables(report: Mapping[str, Any]) -> list[RenderableType]:
    """Returns the tables of a benchmark, and below them sentences on what they do not show.

    Args:
        report: as `moacompress.bench.benchmark.run_bench` returns it.
    """
    runs = report["runs"]
    shown: list[RenderableType] = [machine_line(report["environment"], runs)]
    for phase, (unit, factor) in UNITS.items():
        rows = [row for row in runs if row["phase"] == phase]
        if rows:
            turns = rows[0]["repeats"]
            title = f"{phase.capitalize()}, {unit}: median of {turns} turns, 10th to 90th percentile"
            shown.append(_table(title, rows, "{}_ms", lambda row, side, factor=factor: _time(row, side, factor)))
    if any(row["speedup"] for row in runs):
        slower = any(_slower(row, side) for row in runs for side in row["speedup"])
        shown.append(_table(SPEED_TITLE, runs, "{}_ms", _speedup, SIDES[1:]))
        shown += [SPEED_NOTE, *([SLOWER_NOTE] if slower else []), ""]
    for row in runs:
        if row.get("trace"):
            shown.append(_trace(row))
    shown += [memory_table(runs), BITS_NOTE, CEILING_NOTE, ""]
    return [*shown, *_sentences(report)]


def machine_line(machine: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Returns what of the machine times depend on.

    Args:
        machine: the `environment` of a result.
        rows: of the result; they say how busy the machine was, and which kernels ran.
    """
    row = next((row for row in rows if row["kernel"]), {"kernel": "none of ours"})
    kernel = row["kernel"] + (f" ({machine['isa']})" if machine["isa"] and row["kernel"] == machine["kernel"] else "")
    loads = [found["load_per_core"] for found in rows if found["load_per_core"] is not None]
    busy = f", load up to {max(loads):.1f} a core before" if loads else ""
    threads = _threads(machine["threads"])
    return f"{machine['cpu']}, {threads}{busy}\ntorch {machine['torch']}, kernel {kernel}\n"


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count != 1 else ''}"


def _table(title: str, rows: Sequence[Row], name: str, value: Any, sides: Sequence[str] = SIDES) -> RenderableType:
    """Returns a table with a column for each side that has a value under `name` in some row."""
    there = [side for side in sides if any(row.get(name.format(side)) is not None for row in rows)]
    lines = [
        (_place(row), *("-" if row.get(name.format(side)) is None else value(row, side) for side in there))
        for row in rows
    ]
    return section(title, ("", *(HEADS[side] for side in there)), lines)


def _time(row: Row, side: str, factor: float) -> str:
    low, high = (_digits(end * factor) for end in row["spread_ms"][side])
    return f"{_digits(row[f'{side}_ms'] * factor)} [{low}, {high}]"


def _digits(value: float) -> str:
    """Returns a time with three digits, as far as it has a fraction."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _speedup(row: Row, side: str) -> str:
    if side not in row["speedup"]:
        return "-"
    found = row["speedup"][side]
    return estimate_text(found["value"], found["ci95"], ".2f", "*" if _slower(row, side) else "")


def _slower(row: Row, side: str) -> bool:
    return side in row["speedup"] and bool(row["speedup"][side]["value"] < 1)


def _trace(row: Row) -> RenderableType:
    trace = row["trace"]
    lines = [
        (found["phase"], _digits(found["ms"]), f"{found['ms'] / trace['step_ms']:.1%}", _digits(found["wait_ms"]))
        for found in trace["phases"]
    ]
    waited = sum(found["wait_ms"] for found in trace["phases"])
    lines.append(("all", _digits(trace["step_ms"]), "100.0%", _digits(waited)))
    title = TRACE_TITLE.format(cell=_cell(row), ms=_digits(trace["step_ms"]), threads=_threads(trace["threads"]))
    return section(title, ("", "ms", "share", "threads waited, ms together"), lines)


def memory_table(runs: Sequence[Row]) -> RenderableType:
    """Returns what weights and caches take, and the most that a process took beside, as `memory_rows`."""
    return section(MEMORY_TITLE, *memory_rows(runs))


def memory_rows(runs: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns columns and rows of memory in MiB: weights, caches, and the peaks of the sides of which one was measured.

    Args:
        runs: rows of a benchmark; where no peak was measured a cell comes once, not once a phase.
    """
    sides = [side for side in SIDES if any(row.get(f"peak_bytes_{side}") is not None for row in runs)]
    first = runs[0]["phase"]
    rows = [
        (
            _place(row) if sides else _cell(row),
            *(_mebibytes(row[name], 1) for name in ("weight_bytes", "kv_bytes_dense")),
            f"{_mebibytes(row['kv_bytes_plan'], 1)}, {row['kv_bytes_plan'] / row['kv_bytes_dense']:.1%}",
            f"{row['bits']['keys']:.1f}/{row['bits']['values']:.1f}",
            f"{row['byte_ratio']:.2f}",
            *(_mebibytes(row.get(f"peak_bytes_{side}")) for side in sides),
        )
        for row in runs
        if sides or row["phase"] == first
    ]
    peaks = (f"peak, {HEADS[side]}" for side in sides)
    return ("", "weights", "KV, dense", "KV, this plan", "bits", "ceiling", *peaks), rows


def _mebibytes(count: int | None, digits: int = 0) -> str:
    """Returns a size, all in one unit: what differs between sides is small beside the weights."""
    return "-" if count is None else f"{count / 2**20:,.{digits}f}"


def _place(row: Row) -> str:
    return f"{row['phase']} {_cell(row)}"


def _cell(row: Row) -> str:
    return f"{row['batch']} x {format_length(row['length'])} {DTYPES[row['dtype']]}"


def _sentences(report: Mapping[str, Any]) -> Iterator[str]:
    for row in report["runs"]:
        if row["phase"] != "decode":
            continue
        if row["dense_best_refused"]:
            yield f"{_cell(row)}: a static cache with a compiled step is left out, because {row['dense_best_refused']}."
        elif row["dense_best"] is not None:
            yield f"{_cell(row)}: the best dense is {_named(row['dense_best'])}."
        if gain := gain_text(row):
            yield f"{_cell(row)}: {gain}."
        if routes := row["routes"].get("plan"):
            yield f"{_cell(row)}: steps under the plan go by {', then '.join(routes)}."
        for side in ("plan", "full_span"):
            found = row["graphs"].get(side)
            if found and (found["graph_breaks"] or found["recompiles"] or found["graph_calls"] != found["steps"]):
                yield f"{_cell(row)}: the compiled step of {HEADS[side]} was not one graph all the time."
    for found in report["break_even"]:
        yield f"Batch {found['batch']}, {DTYPES[found['dtype']]}: decoding is {found['text']}."


def gain_text(row: Row) -> str:
    """Returns how much of a step's gain over dense the plan gives and how much the kernels, which is the rest.

    Empty where a side was not timed.
    """
    if not {"full_span", "dense"} <= row["speedup"].keys():
        return ""
    whole, plan = (row["speedup"][side]["value"] for side in ("dense", "full_span"))
    return f"{whole:.2f}x dense's speed: {whole / plan:.2f}x from the kernels, {plan:.2f}x from the plan"


def _named(best: str) -> str:
    return "the default cache, not compiled" if best == "dense" else f"the {best}"
