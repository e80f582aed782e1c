"""What an evaluation came to, for people (sentences and tables) and for spreadsheets (CSV)."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import RenderableType

from moacompress.core.printable import printable
from moacompress.core.shingles import OVERLAP_LIMIT, SHINGLE_WORDS
from moacompress.core.statistics import SIGNIFICANT
from moacompress.core.tables import Columns, Row, Table, estimate_text, readable_bytes, rounded_text
from moacompress.evaluation.baselines.compared_models import DENSE_SIDES
from moacompress.evaluation.tasks.task import CALIBRATED, KINDS, OWN, UNSEEN
from moacompress.rules.budget import format_length

SAID = {
    OWN: "Your own rows, held out",
    UNSEEN: "Kinds of prompts that no calibration has",
    CALIBRATED: "Kinds that the plan was calibrated on",
}
"""What the kinds of prompts are called."""
RowGroup = dict[str, dict[str, Row]]
"""Rows of a task and length, by model and metric."""
NAME_WIDTH = 20
CSV_COLUMNS = (
    "kind", "model", "task", "length", "metric", "value", "low", "high", "prompts", "kv_bytes", "kv_bytes_of_model",
    "tokens", "sink", "window", "formats", "p", "overlap", "documents",
)  # fmt: skip
"""`kind` is `result`, `difference` (the plan minus `model`) or `lm_eval`; `low` and `high` are the 95% interval, empty below 5
prompts; `p` is that of a difference; `documents` is n where several prompts are of one document."""
TASK_TITLE = "Tasks, mean and 95% interval over n prompts; retention: of those that {} (how many)"
ANSWERED, ANSWERED_TWICE = "dense gets right", "dense gets right by our kernels and by transformers' attention"
TEXT_TITLE = "Long text: perplexity of first and last half; KL to dense and same top token in the last (n windows)"
DIFFERENCE_TITLE = "This plan minus the other model, paired, 95% interval; * p < .05, exact or permutation test"
POOLED_TITLE = "All prompts of a kind together: first what no calibration has, then what the plan was calibrated on"
POOLED_DIFFERENCE_TITLE = "All prompts of a kind: this plan minus the other, paired, with 95% interval; * p < .05"
TEXT_DIFFERENCE_TITLE = "Long text: this plan minus the other model, paired by document, with 95% interval; * p < .05"
OVERLAP_UNKNOWN = "Overlap with calibration is unknown: the checkpoint does not say what the plan was calibrated on."
CHANCE_NOTE = "Each of {} differences is tested alone: if none were real, up to {} stars would come up by chance."
FLOOR_NOTE = "* Dense cannot do this itself (its interval ends below 0.2): no evidence for or against a plan."


def kept_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns what a plan keeps of each kind of prompts, the kind that a claim rests on first.

    Rows have `kind`, `tasks`, `lengths`, `prompts`, and where dense was measured `dense_right`, how many prompts it answers
    in full, `kept` with its `ci95` (None where n is too small), the plan's mean exact match on these, and `exact_match`,
    that of dense and the plan on all prompts: of what dense answers by luck a plan that is as good keeps less than all, and
    it may answer others.
    """
    pooled = {(row["model"], row["task"], row["metric"]): row for row in evaluation["pooled"]["results"]}
    found = []
    for kind in KINDS:
        tasks = [name for name, of in evaluation["kinds"].items() if of == kind]
        if not tasks:
            continue
        lengths = sorted({row["length"] for row in evaluation["results"] if row["task"] in tasks})
        prompts = pooled["plan", kind, "exact_match"]["prompts"]
        row: dict[str, Any] = {"kind": kind, "tasks": tasks, "lengths": lengths, "prompts": prompts}
        kept = pooled.get(("plan", kind, "retention"))
        if kept is not None:
            row |= {"dense_right": kept["prompts"], "kept": kept["value"], "ci95": kept["ci95"]}
        elif ("dense", kind, "exact_match") in pooled:
            row |= {"dense_right": 0, "kept": None, "ci95": None}
        if "dense_right" in row:
            sides = (side for side in DENSE_SIDES if (side, kind, "exact_match") in pooled)
            row["exact_match"] = {side: pooled[side, kind, "exact_match"]["value"] for side in (*sides, "plan")}
        found.append(row)
    return found


def kept_sentence(row: Mapping[str, Any]) -> str:
    """Returns one row of `kept_rows` as a sentence."""
    of = f"{SAID[row['kind']]} ({', '.join(row['tasks'])}; {', '.join(map(format_length, row['lengths']))} tokens)"
    if "dense_right" not in row:
        return f"{of}: {row['prompts']} prompts; dense was not measured."
    if not row["dense_right"]:
        return f"{of}: dense answers none of {row['prompts']} prompts, so nothing follows from them."
    return (
        f"{of}: dense answers {row['dense_right']} of {row['prompts']} prompts, and the plan "
        f"{rounded_text(row['kept'], '.0%')} of these ({interval_text(row)}); {all_text(row)}."
    )


def all_text(row: Mapping[str, Any]) -> str:
    """Returns the exact match on all prompts of a row of `kept_rows`."""
    sides = (f"{side} {rounded_text(value, '.0%')}" for side, value in row["exact_match"].items())
    return f"exact match on all {row['prompts']}: {', '.join(sides)}"


def interval_text(row: Mapping[str, Any]) -> str:
    """Returns the interval of a row of `kept_rows`, or that there is none."""
    ends = row["ci95"]
    return "n too small for an interval" if ends is None else "95% interval {:.0%} to {:.0%}".format(*ends)


def not_measured_sentence(missing: list[str]) -> str:
    """Returns what an evaluation says nothing about, as a sentence."""
    return f"Not measured: {', '.join(missing)}."


def headline(evaluation: Mapping[str, Any]) -> list[str]:
    """Returns what an evaluation says of a plan, in sentences; none where no task was measured."""
    rows = kept_rows(evaluation)
    return [*map(kept_sentence, rows), not_measured_sentence(evaluation["not_measured"])] if rows else []


def _estimate(metric: str, form: str = ".2f") -> Callable[[Mapping[str, Row]], str]:
    """Returns what writes a metric of a model, such as `0.95 [0.87, 1.00]`; a star marks a difference that a test finds."""

    def write(metrics: Mapping[str, Row]) -> str:
        if metric not in metrics:
            return "-"
        row = metrics[metric]
        return estimate_text(row["value"], row["ci95"], form, "*" if row.get("p", 1.0) < SIGNIFICANT else "")

    return write


def _any(metrics: Mapping[str, Row]) -> Row:
    """Returns the row of a model that says of how many prompts and bytes its numbers are."""
    return metrics["exact_match"] if "exact_match" in metrics else metrics["kl"]


def _retention(metrics: Mapping[str, Row]) -> str:
    return f"{_estimate('retention')(metrics)} ({metrics['retention']['prompts']})" if "retention" in metrics else "-"


def _prompts(metrics: Mapping[str, Row]) -> str:
    """Returns how many prompts, and of how many documents where several are of one: these are its n."""
    row = _any(metrics)
    count = row.get("documents", row["prompts"])
    return str(row["prompts"]) if count == row["prompts"] else f"{row['prompts']} of {count} documents"


SIZE: Columns = {"KV cache": lambda metrics: readable_bytes(_any(metrics)["kv_bytes"]), "n": _prompts}
TASKS: Columns = SIZE | {
    "exact match": _estimate("exact_match"),
    "retention": _retention,
    "accuracy": lambda metrics: rounded_text(metrics["accuracy"]["value"], ".2f"),
    "NLL": lambda metrics: f"{metrics['nll']['value']:.3f}",
}
POOLED: Columns = {name: write for name, write in TASKS.items() if name != "accuracy"}
TEXTS: Columns = SIZE | {
    "first": lambda metrics: f"{metrics['ppl_early']['value']:.1f}",
    "last": _estimate("ppl_late", ".1f"),
    "KL": _estimate("kl", ".3f"),
    "same top": _estimate("top1_agreement"),
}
TASK_DIFFERENCES: Columns = {
    "n": _prompts,
    "exact match": _estimate("exact_match", "+.2f"),
    "accuracy": _estimate("accuracy", "+.2f"),
    "NLL": _estimate("nll", "+.2f"),
}
TEXT_DIFFERENCES: Columns = {
    "n": lambda metrics: str(metrics["kl"]["prompts"]),
    "documents": lambda metrics: str(metrics["kl"]["documents"]),
    "last": _estimate("ppl_late", "+.2f"),
    "KL": _estimate("kl", "+.3f"),
    "same top": _estimate("top1_agreement", "+.2f"),
}
POOLED_DIFFERENCES: Columns = {
    "exact match": _estimate("exact_match", "+.2f"),
    "retention": _estimate("retention", "+.2f"),
    "NLL": _estimate("nll", "+.2f"),
}
LM_EVAL: Columns = {
    "task": lambda row: row["task"],
    "model": lambda row: row["model"],
    "n": lambda row: str(row["prompts"]),
    "metric": lambda row: row["metric"],
    "value": lambda row: estimate_text(row["value"], row["ci95"], ".3f"),
}


def evaluation_tables(report: Mapping[str, Any]) -> list[RenderableType]:
    """Returns the tables of what `evaluate` returns, each row with its prompts and KV bytes, models beside each other."""
    results, differences, pooled = report["results"], report["differences"], report["pooled"]
    marks = place_marks(report)
    tasks = _groups(results, "exact_match")
    several = len(tasks) > 1  # of one alone the pooled prompts would be the same again
    twice = any(len(row.get("prompts_dense", ())) > 1 for row in results)
    parts: list[tuple[str, Columns, list[RowGroup]]] = [
        (TASK_TITLE.format(ANSWERED_TWICE if twice else ANSWERED), TASKS, tasks),
        (TEXT_TITLE, TEXTS, _groups(results, "ppl_late")),
        (DIFFERENCE_TITLE, TASK_DIFFERENCES, _groups(differences, "exact_match")),
        (TEXT_DIFFERENCE_TITLE, TEXT_DIFFERENCES, _groups(differences, "kl")),
        (POOLED_TITLE, POOLED, _groups(pooled["results"], "exact_match") if several else []),
        (POOLED_DIFFERENCE_TITLE, POOLED_DIFFERENCES, _groups(pooled["differences"], "exact_match") if several else []),
    ]
    shown: list[RenderableType] = [*headline(report), ""] if report["kinds"] else []
    shown += [_table(title, columns, groups, marks) for title, columns, groups in parts if groups]
    tested = sum(row["metric"] != "ppl_early" for row in differences)
    tested += sum(row["metric"] != "accuracy" for row in pooled["differences"]) if several else 0
    if tested > 1:
        shown.append(CHANCE_NOTE.format(tested, f"{SIGNIFICANT * tested:.2g}"))
    if report.get("lm_eval"):
        shown.append(Table.of("lm-evaluation-harness", LM_EVAL, report["lm_eval"]))
    if results:
        shown.append(overlap_note(results))
    return [*shown, FLOOR_NOTE] if report["at_floor"] else shown


def place_marks(report: Mapping[str, Any]) -> dict[tuple[str, int], str]:
    """Returns the marks of tasks and lengths: `*` of what dense cannot do, `†` of what calibration has seen."""
    marks = {(row["task"], row["length"]): "*" for row in report.get("at_floor", ())}
    for row in report.get("seen_in_calibration", ()):
        place = row["task"], row["length"]
        marks[place] = f"{marks.get(place, '')}†"
    return marks


def _groups(rows: Iterable[Row], metric: str) -> list[RowGroup]:
    """Returns the rows of each task and length with a metric, in order of appearance."""
    found: dict[tuple[str, int], RowGroup] = {}
    for row in rows:
        group = found.setdefault((row["task"], row["length"]), {})
        group.setdefault(row["model"], {})[row["metric"]] = row
    return [group for group in found.values() if metric in next(iter(group.values()))]


def _table(title: str, columns: Columns, groups: Iterable[RowGroup], marks: Mapping[tuple[str, int], str]) -> Table:
    """Returns a table with a line for every task and length, and below it one for each model."""
    lines: list[list[str]] = []
    for group in groups:
        row = next(iter(next(iter(group.values())).values()))
        lines.append([_place(row) + marks.get((row["task"], row["length"]), "")])
        for model, metrics in group.items():
            name = model if len(model) <= NAME_WIDTH else f"…{model[1 - NAME_WIDTH :]}"
            lines.append([f"  {name}", *(write(metrics) for write in columns.values())])
    return Table(title, ("", *columns), lines)


def _place(row: Row) -> str:
    return row["task"] if row["length"] is None else f"{row['task']}@{format_length(row['length'])}"


def overlap_note(results: Iterable[Row]) -> str:
    """Returns in a sentence how much of what was measured on the plan's calibration has seen."""
    places: dict[str, float | None] = {_place(row): row.get("overlap") for row in results}
    known = {place: share for place, share in places.items() if share is not None}
    if not known:
        return OVERLAP_UNKNOWN
    some = ", ".join(
        f"{place} {share:.1%}{'†' if share > OVERLAP_LIMIT else ''}" for place, share in known.items() if share
    )
    unknown = [place for place in places if place not in known]
    return (
        f"Overlap with calibration (runs of {SHINGLE_WORDS} words): {some or '0.0%'}"
        f"{'; 0.0% in all others' if some and not all(known.values()) else ''}"
        f"{'; unknown for ' + ', '.join(unknown) if unknown else ''}."
        f"{' † Calibration has seen this text: its numbers flatter the plan.' if '†' in some else ''}"
    )


def failure_lines(report: Mapping[str, Any]) -> list[str]:
    """Returns the prompts that plan and dense answer differently well: the end of the question, the reference, both answers."""
    rows = [row for row in report["answers"] if "dense" in row and row["dense_match"] != row["plan_match"]]
    lines = [f"{len(rows)} of {len(report['answers'])} prompts are answered differently well by the plan and by dense."]
    for row in rows:
        texts = {
            "question": row["question"],
            "reference": " | ".join(row["references"]),
            f"dense ({row['dense_match']:.0%} right)": row["dense"],
            f"this plan ({row['plan_match']:.0%} right)": row["plan"],
        }
        said = "\n".join(f"  {name}: {_one_line(text)}" for name, text in texts.items())
        lines.append(f"\n{_place(row)}\n{said}")
    return lines


def _one_line(text: str) -> str:
    """Returns a text for a terminal on one line: what would move its cursor or colour it is spelt out."""
    return printable(text.strip().replace("\n", " ⏎ ").replace("\t", " "))


def csv_text(report: Mapping[str, Any]) -> str:
    """Returns all rows of an evaluation as CSV with the columns `CSV_COLUMNS`."""
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    pooled = report["pooled"]
    parts = {
        "result": [*report["results"], *pooled["results"]],
        "difference": [*report["differences"], *pooled["differences"]],
        "lm_eval": report.get("lm_eval", ()),
    }
    for kind, rows in parts.items():
        for row in rows:
            low, high = row["ci95"] or ("", "")
            writer.writerow({**row, "kind": kind, "low": low, "high": high})
    return file.getvalue()
