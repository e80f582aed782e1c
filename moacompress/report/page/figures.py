"""The pictures of what a plan still answers, what it costs, and how it was found."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from moacompress.core.artefact_names import AUDIT_FILE, BENCH_FILE, EVALUATION_FILE, MODEL_FOLDER
from moacompress.core.tables import Columns, Table, estimate_text, readable_bytes, readable_number
from moacompress.report.bench_tables import gain_text, memory_table
from moacompress.report.evaluation_tables import place_marks
from moacompress.report.page.findings import EXPLANATIONS, FRONTS, Finding, Findings, reading_file
from moacompress.report.page.picture import (
    OTHERS,
    ROLES,
    Picture,
    Trace,
    axis,
    bar_layout,
    bars,
    dots,
    intervals,
    lines,
    roles_of,
)
from moacompress.report.search_tables import MOA_NOTE, NAMES, RACED_NOTE, trial_remark
from moacompress.rules.budget import format_length
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.untrusted import reading_notes
from moacompress.search.measure.kl_difference import CAUTION

METRICS = {
    "exact_match": ("Exact match", "share of the prompts"),
    "retention": ("Kept of what dense gets right", "share of those prompts"),
    "nll": ("Loss of the answer", "negative log-likelihood, nats per token; less is better"),
    "ppl_late": ("Perplexity of long text", "last half of each text; less is better"),
    "kl": ("KL to dense on long text", "nats per token; less is better"),
}
"""What is shown of an evaluation, in this order: title and axis."""
SHARES = ("exact_match", "retention")
SHOWN = 200
"""Most characters of a sample's text."""
SIDES = {"plan": "this plan", "full_span": "all keys, the same kernels", "dense": "dense", "dense_best": "best dense"}
ROLE_OF = {"plan": "plan", "full_span": "other-1", "dense": "dense", "dense_best": "uniform"}
SHORTEST, LONGEST = 256, 32768
MIB = 2**20
KL = "KL to dense, nats per token"
PHASE_COLOURS = (
    "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#332288", "#AA4499", "#661100", "#999999",
)  # fmt: skip
"""Of the phases of a step, in their order."""


@reading_file(EVALUATION_FILE)
def quality_pictures(evaluation: Finding) -> list[Picture]:
    """Returns a picture of every metric that `eval.json` has, a group of bars for each task and length."""
    marks = {place: "".join(f" {mark}" for mark in found) for place, found in place_marks(evaluation).items()}
    rows = [
        {**row, "task": f"{row['task']}{marks.get((row['task'], row['length']), '')}"}
        for row in (*evaluation["pooled"]["results"], *evaluation["results"])
    ]
    note = "Bars end at what was measured; lines are 95% intervals."
    if evaluation.get("at_floor"):
        note += " * Dense cannot do this itself, so nothing follows from it."
    roles, names = roles_of(row["model"] for row in rows), side_names(row["model"] for row in rows)
    found = []
    for metric, (title, unit) in METRICS.items():
        shown = [row for row in rows if row["metric"] == metric]
        if not shown:
            continue
        groups = list(dict.fromkeys(map(group_name, shown)))
        models = [name for name in roles if any(row["model"] == name for row in shown)]
        traces = [
            _metric_bars(names[name], roles[name], [row for row in shown if row["model"] == name]) for name in models
        ]
        height = 130 + len(groups) * (16 + 13 * len(models))
        layout = bar_layout(unit, groups, height, "group", **({"range": [0, 1.02]} if metric in SHARES else {}))
        columns: Columns = {
            "task": group_name,
            "model": lambda row: names[row["model"]],
            "value": lambda row: f"{row['value']:.3g}",
            "95% interval": lambda row: "{:.3g} to {:.3g}".format(*row["ci95"]) if row["ci95"] else "-",
            "prompts": lambda row: str(row["prompts"]),
            "KV bytes": _bytes,
        }
        table = Table.of(title, columns, shown)
        layout["bargap"] = 0.25
        found.append(Picture(f"quality-{metric}", title, traces, layout, note, table.columns, table.rows))
    return found


def _metric_bars(name: str, role: str, rows: list[Any]) -> Trace:
    values = [row["value"] for row in rows]
    return bars(
        ROLES[role][0],
        name,
        values,
        [group_name(row) for row in rows],
        error_x=intervals(values, [row["ci95"] or (row["value"],) * 2 for row in rows]),
        meta={"role": role},
        customdata=[f"{row['prompts']} prompts, {_bytes(row)} bytes" for row in rows],
        hovertemplate="%{y}: %{x:.3g}<br>%{customdata}<extra>%{fullData.name}</extra>",
    )


def group_name(row: Any) -> str:
    """Returns the task and the length of a row."""
    return f"{row['task']}" if row["length"] is None else f"{row['task']}, {format_length(row['length'])}"


def side_names(models: Iterable[str]) -> dict[str, str]:
    """Returns what sides are called on the page: checkpoints by as much of the end of their path as tells them apart."""
    given = list(dict.fromkeys(models))
    parts = {
        name: [part for part in PurePath(name).parts if part not in ("/", MODEL_FOLDER)] or [name]
        for name in given
        if "/" in name
    }
    found = {name: "this plan" if name == "plan" else name for name in given}
    for name, mine in parts.items():
        others = [theirs for other, theirs in parts.items() if other != name]
        count = next((n for n in range(1, len(mine)) if all(mine[-n:] != theirs[-n:] for theirs in others)), len(mine))
        found[name] = "/".join(mine[-count:])
    return found


def _bytes(row: Any) -> str:
    return "-" if row.get("kv_bytes") is None else f"{row.get('kv_bytes_of_model', row['kv_bytes']):,}"


@reading_file(EVALUATION_FILE)
def answer_table(evaluation: Finding) -> Table | None:
    """Returns sample answers: one that plan and dense answer differently well, one right, one wrong; None without any."""
    chosen: dict[str, tuple[str, ...]] = {}
    for row in evaluation["answers"]:
        if "dense" in row:
            differ = row["dense_match"] != row["plan_match"]
            outcome = "differ" if differ else "right" if row["plan_match"] == 1.0 else "wrong"
            texts = (row["question"], row["references"][0], row["dense"], row["plan"])
            chosen.setdefault(outcome, (group_name(row), *map(_shortened, texts)))
    rows = [chosen[outcome] for outcome in ("differ", "right", "wrong") if outcome in chosen]
    columns = ("sample answers", "question", "reference", "dense", "this plan")
    return Table("Answers", columns, rows, text_columns=len(columns)) if rows else None


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"…{text[1 - SHOWN :]}"


def memory_picture(found: Findings) -> Picture:
    """Returns the bytes of cache at many lengths, exact: they follow from the plan. All keys at 8 and 4 bits are beside."""
    plan = found.plan
    own = {n for n in (*plan.stated_lengths, found.reference) if n > 0}
    lengths = sorted({SHORTEST << power for power in range((LONGEST // SHORTEST).bit_length())} | own)
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
    layout = {"xaxis": _tokens(ticks, rangemode="tozero"), "yaxis": axis("MiB", rangemode="tozero"), "height": 340}
    rows = [
        (format_length(n), *map(readable_bytes, column), f"{column[-1] / column[0]:.1%}")
        for n, *column in zip(lengths, *sizes.values(), strict=True)
    ]
    note = "Batch 1, whole blocks of 16 tokens; the share is the plan's of dense."
    return Picture("memory", "KV cache", traces, layout, note, ("tokens", *sizes, "share"), rows)


def _all_keys(plan: Plan, name: str) -> Plan:
    """Returns the plan that keeps everything in one format."""
    return Plan.uniform(plan.model, replace(Rule.FULL, key_format=name, value_format=name))


def _tokens(lengths: list[int], **more: Any) -> dict[str, Any]:
    """Returns an axis of tokens, with ticks at powers of two among the lengths, or at all of them where there is none."""
    shown = [n for n in lengths if n & (n - 1) == 0] or lengths
    return axis("tokens", tickvals=shown, ticktext=[format_length(n) for n in shown], **more)


@reading_file(BENCH_FILE)
def speed_pictures(bench: Finding) -> list[Picture]:
    """Returns the pictures of times, of where they go if that was traced, and of peaks of memory if these were measured."""
    groups: dict[tuple[str, int, str], list[Any]] = {}
    for row in bench["runs"]:
        groups.setdefault((row["phase"], row["batch"], row["dtype"]), []).append(row)
    found = [_latency_picture(*group, rows, bench["break_even"]) for group, rows in groups.items()]
    more = (_trace_picture(bench), peak_picture(bench))
    return [*found, *(picture for picture in more if picture is not None)]


def _latency_picture(phase: str, batch: int, dtype: str, rows: list[Any], break_even: Any) -> Picture:
    """Returns the time of decode steps or of prompts against length."""
    rows = sorted(rows, key=lambda row: row["length"])
    traces = []
    for side, name in SIDES.items():
        points = [(row["length"], row[f"{side}_ms"]) for row in rows if row[f"{side}_ms"] is not None]
        if points:
            x, y = zip(*points, strict=True)
            traces.append(lines(ROLE_OF[side], name, x, y, hovertemplate="%{x:,} tokens: %{y:.4g} ms"))
    layout = {
        "xaxis": _tokens([row["length"] for row in rows], type="log"),
        "yaxis": axis("ms a step" if phase == "decode" else "ms a prompt", rangemode="tozero"),
        "height": 340,
    }
    cells = [
        (format_length(row["length"]), *(readable_number(row[f"{side}_ms"]) for side in SIDES), _speedup(row))
        for row in rows
    ]
    columns = ("tokens", *SIDES.values(), "times as fast as dense (median of the turns' ratios)")
    note = ""
    if phase == "decode":
        said = "; ".join(each["text"] for each in break_even if (each["batch"], each["dtype"]) == (batch, dtype))
        note = f"This plan is {said}." if said else ""
        gain = gain_text(rows[-1])
        note += f" At {format_length(rows[-1]['length'])} tokens {gain}." if gain else ""
    title = f"{'A decode step' if phase == 'decode' else 'A prompt'}, batch {batch}, {dtype}"
    return Picture(f"{phase}-{batch}-{dtype}", title, traces, layout, note, columns, cells)


def _speedup(row: Any) -> str:
    found = row["speedup"].get("dense")
    return "-" if found is None else estimate_text(found["value"], found["ci95"])


def _trace_picture(bench: Finding) -> Picture | None:
    """Returns where the time of decode steps goes, a bar for each place of the benchmark; None where nothing was traced."""
    rows = [row for row in bench["runs"] if row.get("trace")]
    if not rows:
        return None
    names = [f"{row['batch']} x {format_length(row['length'])}, {row['dtype']}" for row in rows]
    times = [{found["phase"]: found for found in row["trace"]["phases"]} for row in rows]
    phases = list(dict.fromkeys(phase for found in times for phase in found))
    traces = [
        bars(
            PHASE_COLOURS[number % len(PHASE_COLOURS)],
            phase,
            [found[phase]["ms"] for found in times],
            names,
            customdata=[found[phase]["wait_ms"] for found in times],
            hovertemplate="%{x:.3g} ms; threads waited %{customdata:.3g} ms together<extra>%{fullData.name}</extra>",
        )
        for number, phase in enumerate(phases)
    ]
    cells = [
        (phase, *(f"{found[phase]['ms']:.3g} / {found[phase]['wait_ms']:.3g}" for found in times)) for phase in phases
    ]
    layout = bar_layout("ms of a step", names, 190 + 40 * len(rows), "stack")
    note = "Of this plan, traced in turns of its own. In the table behind each time: what the threads waited in it, together."
    return Picture("trace", "Where a step's time goes", traces, layout, note, ("phase", *names), cells)


def peak_picture(bench: Finding) -> Picture | None:
    """Returns the most memory that a process took, beside weights and caches; None where no peak was measured."""
    runs = bench["runs"]
    keys = {side: f"peak_bytes_{side}" for side in SIDES}
    if not any(row.get(key) is not None for row in runs for key in keys.values()):
        return None
    table = memory_table(runs)
    names = [row[0] for row in table.rows]
    traces = [
        bars(
            colour,
            SIDES[side],
            [None if row.get(key) is None else row[key] / MIB for row in runs],
            names,
            hovertemplate="%{x:,.0f} MiB<extra>%{fullData.name}</extra>",
        )
        for (side, key), colour in zip(keys.items(), PHASE_COLOURS, strict=False)
        if any(row.get(key) is not None for row in runs)
    ]
    layout = bar_layout("MiB of a process at its peak", names, 190 + 20 * len(names) * len(traces), "group")
    note = "Weights, caches, Python and the libraries, each side in a process of its own. The table is in MiB."
    return Picture("peaks", "Memory", traces, layout, note, table.columns, table.rows)


def baselines_picture(found: Findings) -> Picture | None:
    """Returns the measured KL of the plan and of what it was measured beside, at the same bytes; None where there is none."""
    noted = (found.explanation or {}).get("harm")
    with reading_file(EXPLANATIONS) if noted else reading_notes("measured KL"):
        quality = found.plan.quality
        return _baselines(dict(noted or quality.get("measured_harm") or {}), quality.get("samples"))


def _baselines(kl: dict[str, float | None], samples: int | None) -> Picture | None:
    there = sorted(
        ((value, name) for name, value in kl.items() if value is not None and name != "trial0"), reverse=True
    )
    if len(there) < 2:
        return None
    values, names = [value for value, _ in there], [NAMES.get(name, name) for _, name in there]
    roles = [name if name in ROLES else "faint" for _, name in there]
    colours, _, symbols = zip(*(ROLES[role] for role in roles), strict=True)
    trace: Trace = {
        "type": "scatter",
        "mode": "markers",
        "x": values,
        "y": names,
        "marker": {"color": colours, "symbol": symbols, "size": 12},
        "meta": {"roles": roles},
        "hovertemplate": "%{y}: %{x:.4g} nats<extra></extra>",
    }
    layout = {
        "xaxis": axis(KL, rangemode="tozero"),
        "yaxis": axis("", type="category"),
        "height": 130 + 26 * len(there),
        "showlegend": False,
    }
    on = f", on {samples} validation samples" if samples else ""
    note = f"Each baseline at its best sink, window and formats{on}. {RACED_NOTE}"
    note += f" {MOA_NOTE}" if NAMES["moa"] in names else ""
    rows = [(name, readable_number(value)) for value, name in zip(values, names, strict=True)]
    return Picture("baselines", "KL at the same bytes", [trace], layout, note, ("plan", "nats per token"), rows)


@reading_file(AUDIT_FILE)
def audit_picture(audit: Finding) -> Picture:
    """Returns predicted against measured KL of an audit's ablations, formats and plans."""
    name = audit["estimator"]
    groups = {
        "one KV head's span": [(point["predicted"].get(name), point["measured"]) for point in audit["points"]],
        "one KV head's format": [
            (point["predicted"], point["measured"]) for point in audit.get("precision_points", ())
        ],
        "whole plans": [(point["predicted"].get(name), point["measured"]) for point in audit["plans"]],
    }
    note = f"{audit['samples']} held-out samples, estimator {name}. On the line, predicted and measured KL are equal."
    return _scatter("audit", "Predicted and measured KL: the audit", groups, note)


@reading_file(EXPLANATIONS)
def trials_picture(explanation: Finding) -> Picture | None:
    """Returns predicted against measured KL of the plans of a search; None of fewer than two."""
    predicted = explanation.get("predicted", {})
    pairs = predicted.get("pairs") or ()
    if len(pairs) < 2:
        return None
    rank = predicted["spearman"]
    note = f"The {len(pairs)} plans of the search" + ("." if rank is None else f"; rank correlation {rank:.2f}.")
    return _scatter("trials-predicted", "Predicted and measured KL: the trials", {"a trial's plan": pairs}, note)


def _scatter(name: str, title: str, groups: dict[str, Any], note: str) -> Picture:
    traces, ends, rows = [], [], []
    for role, (kind, points) in zip(("plan", *OTHERS), groups.items(), strict=False):
        pairs = [(x, y) for x, y in points if x is not None and y is not None and x > 0 and y > 0]
        if pairs:
            x, y = zip(*pairs, strict=True)
            ends += [*x, *y]
            traces.append(dots(role, kind, x, y, opacity=0.75, hovertemplate="predicted %{x:.3g}, measured %{y:.3g}"))
            rows += [(kind, readable_number(a), readable_number(b)) for a, b in pairs]
    if ends:
        whole, line = [min(ends), max(ends)], {"dash": "dot", "width": 1}
        traces.append(lines("faint", "equal", whole, whole, mode="lines", line=line, hoverinfo="skip"))
    layout = {
        "xaxis": axis("predicted, nats per token", type="log", exponentformat="none", dtick=1),
        "yaxis": axis("measured, nats per token", type="log", exponentformat="none", dtick=1),
        "height": 380,
    }
    return Picture(name, title, traces, layout, note, ("of", "predicted", "measured"), rows)


@reading_file(EXPLANATIONS)
def history_picture(explanation: Finding) -> Picture | None:
    """Returns the trials of a search in their order, with the best so far; None where the search did not write them down."""
    trials = [row for row in explanation.get("trials", ()) if row["harm"] is not None]
    if len(trials) < 2:
        return None
    best, low = [], math.inf
    for row in trials:
        low = min(low, row["harm"]) if not row["pruned"] else low
        best.append(low)
    ended, pruned = ([row for row in trials if bool(row["pruned"]) == was] for was in (False, True))
    traces = [
        *(
            dots(role, name, [row["trial"] for row in some], [row["harm"] for row in some])
            for role, name, some in (("plan", "measured on all samples", ended), ("uniform", "pruned", pruned))
            if some
        ),
        lines("faint", "best so far", [row["trial"] for row in trials], best, mode="lines", line={"shape": "hv"}),
    ]
    layout = {
        "xaxis": axis("trial", tick0=0, dtick=max(1, len(trials) // 8)),
        "yaxis": axis(KL, rangemode="tozero"),
        "height": 320,
    }
    rows = [(str(row["trial"]), readable_number(row["harm"]), trial_remark(row)) for row in trials]
    note = (
        "Pruned trials saw fewer samples. A trial replaces trial 0 only if its gain in mean KL, paired by sample, exceeds "
        f"{CAUTION:g} standard errors."
    )
    return Picture("history", "Trials of the search", traces, layout, note, ("trial", "nats per token", ""), rows)


@reading_file(FRONTS)
def front_picture(front: Finding) -> Picture | None:
    """Returns the KL of plans of several budgets against their bytes; None where there is only one."""
    points = [(max(point["kv_share"].values()) * 100, point["harm"]["plan"]) for point in front["points"]]
    points = [(share, kl) for share, kl in points if kl is not None]
    if len(points) < 2:
        return None
    trace = lines("plan", "plans", *zip(*points, strict=True))
    layout = {
        "xaxis": axis("% of the dense KV bytes"),
        "yaxis": axis(KL, rangemode="tozero"),
        "height": 320,
        "showlegend": False,
    }
    rows = [(f"{share:.1f}%", readable_number(kl)) for share, kl in points]
    return Picture("front", "KL against bytes", [trace], layout, "", ("bytes", "nats per token"), rows)
