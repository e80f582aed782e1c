"""What a checkpoint still answers, beside the dense model and beside other ways to spend the same bytes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

from moacompress.core.artefact_names import EVALUATION_FILE, MODEL_FOLDER
from moacompress.report.page.figure_style import ROLES, Picture, Trace, axis, intervals, roles_of
from moacompress.report.page.findings import Finding, reading_file
from moacompress.rules.budget import format_length

METRICS = {
    "exact_match": ("Exact match", "share of the prompts"),
    "retention": ("Kept of what dense gets right", "share of those prompts"),
    "nll": ("Loss of the answer", "negative log-likelihood, nats per token; less is better"),
    "ppl_late": ("Perplexity of long text", "last half of each text; less is better"),
    "kl": ("KL to dense on long text", "nats per token; less is better"),
}
"""What is shown, in this order: title and axis."""
SHARES = ("exact_match", "retention")
SHOWN = 200
"""Most characters of a sample's text."""
FLOOR = " * Dense cannot do this itself, so nothing follows from it."


@reading_file(EVALUATION_FILE)
def quality_pictures(evaluation: Finding) -> list[Picture]:
    """Returns a picture of every metric that was measured, a group of bars for each task and length.

    Args:
        evaluation: as `eval.json` has it.

    Raises:
        ArtefactError: it is of another form.
    """
    pooled = evaluation["pooled"]["results"]
    floor = evaluation.get("at_floor", ())
    marks = dict.fromkeys(((row["task"], row["length"]) for row in floor), " *")
    for row in evaluation.get("seen_in_calibration", ()):
        place = row["task"], row["length"]
        marks[place] = f"{marks.get(place, '')} †"
    rows = [
        {**row, "task": f"{row['task']}{marks[place]}"} if (place := (row["task"], row["length"])) in marks else row
        for row in (*pooled, *evaluation["results"])
    ]
    roles, names = roles_of(row["model"] for row in rows), side_names(row["model"] for row in rows)
    found = []
    for metric, (title, unit) in METRICS.items():
        shown = [row for row in rows if row["metric"] == metric]
        if shown:
            found.append(_picture(metric, title, unit, shown, roles, names, FLOOR if floor else ""))
    return found


def _picture(
    metric: str,
    title: str,
    unit: str,
    rows: list[Any],
    roles: dict[str, str],
    names: dict[str, str],
    floor: str,
) -> Picture:
    groups = list(dict.fromkeys(group_name(row) for row in rows))
    models = [name for name in roles if any(row["model"] == name for row in rows)]
    traces = [_bars(names[name], [row for row in rows if row["model"] == name], roles[name]) for name in models]
    layout = {
        "barmode": "group",
        "bargap": 0.25,
        "xaxis": axis(unit, rangemode="tozero", **({"range": [0, 1.02]} if metric in SHARES else {})),
        "yaxis": axis("", autorange="reversed", type="category", categoryorder="array", categoryarray=groups),
        "height": 130 + len(groups) * (16 + 13 * len(models)),
    }
    table = [
        (
            group_name(row),
            names[row["model"]],
            f"{row['value']:.3g}",
            _interval(row),
            str(row["prompts"]),
            _bytes(row),
        )
        for row in rows
    ]
    note = f"Bars end at what was measured; lines are 95% intervals.{floor}"
    columns = ("task", "model", "value", "95% interval", "prompts", "KV bytes")
    return Picture(f"quality-{metric}", title, traces, layout, note, columns, table)


def _bars(name: str, rows: list[Any], role: str) -> Trace:
    values = [row["value"] for row in rows]
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "x": values,
        "y": [group_name(row) for row in rows],
        "error_x": intervals(values, [row["ci95"] or (row["value"],) * 2 for row in rows]),
        "marker": {"color": ROLES[role][0]},
        "meta": {"role": role},
        "customdata": [f"{row['prompts']} prompts, {_bytes(row)} bytes" for row in rows],
        "hovertemplate": "%{y}: %{x:.3g}<br>%{customdata}<extra>%{fullData.name}</extra>",
    }


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


def _interval(row: Any) -> str:
    return "-" if not row["ci95"] else f"{row['ci95'][0]:.3g} to {row['ci95'][1]:.3g}"


def _bytes(row: Any) -> str:
    return "-" if row.get("kv_bytes") is None else f"{row.get('kv_bytes_of_model', row['kv_bytes']):,}"


@reading_file(EVALUATION_FILE)
def answer_table(evaluation: Finding) -> tuple[tuple[str, ...], list[tuple[str, ...]]] | None:
    """Returns columns and rows of sample answers: one that plan and dense answer differently well, one right, one wrong.

    Raises:
        ArtefactError: `eval.json` is of another form.
    """
    chosen: dict[str, tuple[str, ...]] = {}
    for row in evaluation["answers"]:
        if "dense" in row:
            differ = row["dense_match"] != row["plan_match"]
            outcome = "differ" if differ else "right" if row["plan_match"] == 1.0 else "wrong"
            task, texts = group_name(row), (row["question"], row["references"][0], row["dense"], row["plan"])
            chosen.setdefault(outcome, (task, *map(_shortened, texts)))
    rows = [chosen[outcome] for outcome in ("differ", "right", "wrong") if outcome in chosen]
    return (("sample answers", "question", "reference", "dense", "this plan"), rows) if rows else None


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"…{text[1 - SHOWN :]}"
