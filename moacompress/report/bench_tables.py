"""What a benchmark came to, for people: times, speed-ups and memory, where the plan is not faster, and what serving gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import RenderableType

from moacompress.bench.bench_request import SIDES
from moacompress.core.tables import Columns, Row, Table, estimate_text, readable_bytes
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
SERVED: Columns = {
    "": lambda row: f"{HEADS[row['side']]}, {DTYPES[row['dtype']]}",
    "seconds": lambda row: f"{row['seconds']:.1f}",
    "requests/s": lambda row: f"{row['requests_per_s']:.2f}",
    "tokens/s": lambda row: f"{row['tokens_per_s']:.0f}",
    "first token, s: mean, p50, p99": lambda row: "{mean:.2f}, {p50:.2f}, {p99:.2f}".format(**row["first_token_s"]),
    "a token, ms: mean, p99": lambda row: (
        "-"
        if row["token_s"] is None
        else "{:.1f}, {:.1f}".format(*(1e3 * row["token_s"][at] for at in ("mean", "p99")))
    ),
    "at once: mean, most": lambda row: "{mean:.1f}, {most}".format(**row["running"]),
    "preempted": lambda row: str(row["preemptions"]),
}
TRACE_TITLE = "Where a step's time goes under this plan, {cell}: {ms} ms, traced, on {threads}"


def bench_tables(report: Mapping[str, Any]) -> list[RenderableType]:
    """Returns the tables of what `run_bench` returns, and below them sentences on what they do not show."""
    runs = report["runs"]
    shown: list[RenderableType] = [_machine_line(report["environment"], runs)]
    for phase, (unit, factor) in UNITS.items():
        rows = [row for row in runs if row["phase"] == phase]
        if rows:
            title = f"{phase.capitalize()}, {unit}: median of {rows[0]['repeats']} turns, 10th to 90th percentile"
            shown.append(_table_of_sides(title, rows, SIDES, partial(_time, factor=factor)))
    if any(row["speedup"] for row in runs):
        shown += [_table_of_sides(SPEED_TITLE, runs, SIDES[1:], _speedup), SPEED_NOTE]
        shown += [SLOWER_NOTE] if any(_slower(row, side) for row in runs for side in row["speedup"]) else []
        shown.append("")
    shown += [_trace(row) for row in runs if row.get("trace")]
    return [*shown, memory_table(runs), BITS_NOTE, CEILING_NOTE, "", *_sentences(report)]


def _machine_line(machine: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Returns what of the machine times depend on; rows say how busy it was, and which kernels ran."""
    row = next((row for row in rows if row["kernel"]), {"kernel": "none of ours"})
    kernel = row["kernel"] + (f" ({machine['isa']})" if machine["isa"] and row["kernel"] == machine["kernel"] else "")
    loads = [found["load_per_core"] for found in rows if found["load_per_core"] is not None]
    busy = f", load up to {max(loads):.1f} a core before" if loads else ""
    threads = _threads(machine["threads"])
    return f"{machine['cpu']}, {threads}{busy}\ntorch {machine['torch']}, kernel {kernel}\n"


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count != 1 else ''}"


def _table_of_sides(
    title: str, rows: Sequence[Row], sides: Sequence[str], text: Callable[[Row, str], str]
) -> RenderableType:
    """Returns a table with a column for each side that was timed in some row."""

    def cell(side: str) -> Callable[[Row], str]:
        return lambda row: "-" if row.get(f"{side}_ms") is None else text(row, side)

    there = [side for side in sides if any(row.get(f"{side}_ms") is not None for row in rows)]
    return Table.of(title, {"": _place, **{HEADS[side]: cell(side) for side in there}}, rows)


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
    whole = trace["step_ms"]
    waited = sum(found["wait_ms"] for found in trace["phases"])
    columns: Columns = {
        "": lambda found: found["phase"],
        "ms": lambda found: _digits(found["ms"]),
        "share": lambda found: f"{found['ms'] / whole:.1%}",
        "threads waited, ms together": lambda found: _digits(found["wait_ms"]),
    }
    title = TRACE_TITLE.format(cell=_cell(row), ms=_digits(whole), threads=_threads(trace["threads"]))
    return Table.of(title, columns, [*trace["phases"], {"phase": "all", "ms": whole, "wait_ms": waited}])


def memory_table(runs: Sequence[Row]) -> Table:
    """Returns what weights and caches take, and the measured peaks; without any, a cell comes once, not once a phase."""
    sides = [side for side in SIDES if any(row.get(f"peak_bytes_{side}") is not None for row in runs)]
    columns: Columns = {
        "": _place if sides else _cell,
        "weights": lambda row: _mebibytes(row["weight_bytes"], 1),
        "KV, dense": lambda row: _mebibytes(row["kv_bytes_dense"], 1),
        "KV, this plan": lambda row: (
            f"{_mebibytes(row['kv_bytes_plan'], 1)}, {row['kv_bytes_plan'] / row['kv_bytes_dense']:.1%}"
        ),
        "bits": lambda row: f"{row['bits']['keys']:.1f}/{row['bits']['values']:.1f}",
        "ceiling": lambda row: f"{row['byte_ratio']:.2f}",
        **{f"peak, {HEADS[side]}": partial(_peak, side=side) for side in sides},
    }
    return Table.of(MEMORY_TITLE, columns, [row for row in runs if sides or row["phase"] == runs[0]["phase"]])


def _peak(row: Row, side: str) -> str:
    return _mebibytes(row.get(f"peak_bytes_{side}"))


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


def serve_tables(report: Mapping[str, Any]) -> list[RenderableType]:
    """Returns the table of what `run_serving` returns, and how many more requests than dense the plan serves."""
    rows = report["serve"]
    first = rows[0]
    title = (
        f"{first['requests']} requests of {first['prompt_tokens']:,} + {first['new_tokens']:,} tokens in all, in "
        f"{readable_bytes(first['kv_memory'])} of KV cache"
    )
    dense = {row["dtype"]: row for row in rows if row["side"] == "dense"}
    said = [
        f"{DTYPES[row['dtype']]}: the plan serves {row['requests_per_s'] / beside['requests_per_s']:.2f} times as many "
        f"requests a second as dense, {row['running']['mean'] / beside['running']['mean']:.2f} times as many at once."
        for row in rows
        if row["side"] == "plan" and (beside := dense.get(row["dtype"]))
    ]
    return [_machine_line(report["environment"], rows), Table.of(title, SERVED, rows), *said]
