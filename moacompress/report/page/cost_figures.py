"""What a plan costs: bytes of cache by length, and the time of a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moacompress.core.artefact_names import BENCH_FILE
from moacompress.core.statistics import estimate_text
from moacompress.core.tables import readable_bytes
from moacompress.report.bench_tables import gain_text, memory_rows
from moacompress.report.page.figure_style import Picture, Trace, axis, lines
from moacompress.report.page.findings import Finding, Findings, reading_file
from moacompress.rules.budget import format_length
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule

SIDES = {"plan": "this plan", "full_span": "all keys, the same kernels", "dense": "dense", "dense_best": "best dense"}
ROLE_OF = {"plan": "plan", "full_span": "other-1", "dense": "dense", "dense_best": "uniform"}
SHORTEST, LONGEST = 256, 32768
MIB = 2**20


def memory_picture(found: Findings) -> Picture:
    """Returns the bytes of cache at many lengths, exact: they follow from the plan. All keys at 8 and 4 bits are beside."""
    plan = found.plan
    lengths = memory_lengths(found)
    kept = {
        f"dense, {plan.model.dtype}": ("dense", Plan.full(plan.model)),
        "all keys, 8 bits": ("other-1", _all_keys(plan, "int8")),
        "all keys, 4 bits": ("other-2", _all_keys(plan, "int4")),
        "this plan": ("plan", plan),
    }
    sizes = {name: [one.kv_bytes(n) for n in lengths] for name, (_, one) in kept.items()}
    traces = [
        lines(role, name, lengths, [size / MIB for size in sizes[name]], hovertemplate="%{x:,} tokens: %{y:.4g} MiB")
        for name, (role, _) in kept.items()
    ]
    ticks = [n for n in lengths if n & (n - 1) == 0 and n >= lengths[-1] // 8]
    layout = {
        "xaxis": axis("tokens", rangemode="tozero", **length_ticks(ticks)),
        "yaxis": axis("MiB", rangemode="tozero"),
        "height": 340,
    }
    whole, ours = next(iter(sizes.values())), sizes["this plan"]
    rows = [
        (format_length(n), *(readable_bytes(column[at]) for column in sizes.values()), f"{ours[at] / whole[at]:.1%}")
        for at, n in enumerate(lengths)
    ]
    note = "Batch 1, whole blocks of 16 tokens; the share is the plan's of dense."
    return Picture("memory", "KV cache", traces, layout, note, ("tokens", *sizes, "share"), rows)


def _all_keys(plan: Plan, name: str) -> Plan:
    """Returns the plan that keeps everything in one format."""
    return Plan.uniform(plan.model, replace(Rule.FULL, key_format=name, value_format=name))


def memory_lengths(found: Findings) -> list[int]:
    """Returns lengths in powers of two, and those of the plan's budget, ascending."""
    own = {n for n in (*found.plan.stated_lengths, found.reference) if n > 0}
    return sorted({SHORTEST << power for power in range((LONGEST // SHORTEST).bit_length())} | own)


def length_ticks(lengths: list[int]) -> dict[str, Any]:
    """Returns the ticks of an axis of tokens: powers of two among the lengths, or all of them where there is none."""
    shown = [n for n in lengths if n & (n - 1) == 0] or lengths
    return {"tickvals": shown, "ticktext": [format_length(n) for n in shown]}


@reading_file(BENCH_FILE)
def speed_pictures(bench: Finding) -> list[Picture]:
    """Returns the pictures of times, of where they go if that was traced, and of peaks of memory if these were measured.

    Raises:
        ArtefactError: `bench.json` is of another form.
    """
    more = (trace_picture(bench), peak_picture(bench))
    return [*latency_pictures(bench), *(picture for picture in more if picture is not None)]


def latency_pictures(bench: Finding) -> list[Picture]:
    """Returns the time of decode steps and of prompts against length, a picture for each phase, batch and dtype."""
    groups: dict[tuple[str, int, str], list[Any]] = {}
    for row in bench["runs"]:
        groups.setdefault((row["phase"], row["batch"], row["dtype"]), []).append(row)
    found = []
    for (phase, batch, dtype), rows in groups.items():
        rows = sorted(rows, key=lambda row: row["length"])
        lengths = [row["length"] for row in rows]
        traces = []
        for side, name in SIDES.items():
            points = [(row["length"], row[f"{side}_ms"]) for row in rows if row[f"{side}_ms"] is not None]
            if points:
                x, y = zip(*points, strict=True)
                traces.append(lines(ROLE_OF[side], name, x, y, hovertemplate="%{x:,} tokens: %{y:.4g} ms"))
        layout = {
            "xaxis": axis("tokens", type="log", **length_ticks(lengths)),
            "yaxis": axis("ms a step" if phase == "decode" else "ms a prompt", rangemode="tozero"),
            "height": 340,
        }
        table = [
            (format_length(row["length"]), *(_ms(row[f"{side}_ms"]) for side in SIDES), _speedup(row)) for row in rows
        ]
        title = f"{'A decode step' if phase == 'decode' else 'A prompt'}, batch {batch}, {dtype}"
        columns = ("tokens", *SIDES.values(), "times as fast as dense (median of the turns' ratios)")
        note = "; ".join(
            entry["text"]
            for entry in bench["break_even"]
            if phase == "decode" and (entry["batch"], entry["dtype"]) == (batch, dtype)
        )
        note = f"This plan is {note}." if note else ""
        gain = gain_text(rows[-1]) if phase == "decode" else ""
        note += f" At {format_length(lengths[-1])} tokens {gain}." if gain else ""
        found.append(Picture(f"{phase}-{batch}-{dtype}", title, traces, layout, note, columns, table))
    return found


PHASE_COLOURS = (
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#E69F00",
    "#D55E00",
    "#CC79A7",
    "#332288",
    "#AA4499",
    "#661100",
    "#999999",
)
"""Of the phases of a step, in their order."""


def trace_picture(bench: Finding) -> Picture | None:
    """Returns where the time of decode steps goes, a bar for each place of the benchmark; None where nothing was traced."""
    rows = [row for row in bench["runs"] if row.get("trace")]
    if not rows:
        return None
    names = [f"{row['batch']} x {format_length(row['length'])}, {row['dtype']}" for row in rows]
    phases = list(dict.fromkeys(found["phase"] for row in rows for found in row["trace"]["phases"]))
    times = [{found["phase"]: found for found in row["trace"]["phases"]} for row in rows]
    traces: list[Trace] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": phase,
            "x": [found[phase]["ms"] for found in times],
            "y": names,
            "marker": {"color": PHASE_COLOURS[number % len(PHASE_COLOURS)]},
            "customdata": [found[phase]["wait_ms"] for found in times],
            "hovertemplate": "%{x:.3g} ms; threads waited %{customdata:.3g} ms together<extra>%{fullData.name}</extra>",
        }
        for number, phase in enumerate(phases)
    ]
    layout = {
        "barmode": "stack",
        "xaxis": axis("ms of a step", rangemode="tozero"),
        "yaxis": axis("", autorange="reversed", type="category", categoryorder="array", categoryarray=names),
        "height": 190 + 40 * len(rows),
    }
    table = [
        (phase, *(f"{_ms(found[phase]['ms'])} / {_ms(found[phase]['wait_ms'])}" for found in times)) for phase in phases
    ]
    note = "Of this plan, traced in turns of its own. In the table behind each time: what the threads waited in it, together."
    return Picture("trace", "Where a step's time goes", traces, layout, note, ("phase", *names), table)


def peak_picture(bench: Finding) -> Picture | None:
    """Returns the most memory that a process took, beside weights and caches; None where no peak was measured."""
    if not bench["runs"]:  # requests to a server were timed alone
        return None
    columns, table = memory_rows(bench["runs"])
    names = [row[0] for row in table]
    traces: list[Trace] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "x": [None if row.get(key) is None else row[key] / MIB for row in bench["runs"]],
            "y": names,
            "marker": {"color": colour},
            "hovertemplate": "%{x:,.0f} MiB<extra>%{fullData.name}</extra>",
        }
        for (name, key), colour in zip(
            ((name, f"peak_bytes_{side}") for side, name in SIDES.items()), PHASE_COLOURS, strict=False
        )
        if any(row.get(key) is not None for row in bench["runs"])
    ]
    if not traces:
        return None
    layout = {
        "barmode": "group",
        "xaxis": axis("MiB of a process at its peak", rangemode="tozero"),
        "yaxis": axis("", autorange="reversed", type="category", categoryorder="array", categoryarray=names),
        "height": 190 + 20 * len(names) * len(traces),
    }
    note = "Weights, caches, Python and the libraries, each side in a process of its own. The table is in MiB."
    return Picture("peaks", "Memory", traces, layout, note, columns, table)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _speedup(row: Any) -> str:
    found = row["speedup"].get("dense")
    if found is None:
        return "-"
    return estimate_text(found["value"], found["ci95"])


@reading_file(BENCH_FILE)
def machine_text(bench: Finding) -> str:
    """Returns where times were taken.

    Raises:
        ArtefactError: `bench.json` is of another form.
    """
    machine = bench["environment"]
    isa = f" ({machine['isa']})" if machine.get("isa") else ""
    return (
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, kernels {machine['kernel']}{isa}."
    )


def bytes_text(plan: Plan, n: int) -> tuple[str, str, str]:
    """Returns the dense bytes, the plan's and their share at a length."""
    dense, ours = plan.model.dense_kv_bytes(n), plan.kv_bytes(n)
    return readable_bytes(dense), readable_bytes(ours), f"{ours / dense:.1%}"
