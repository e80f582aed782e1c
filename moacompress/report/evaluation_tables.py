"""What an evaluation came to, for people (tables) and for spreadsheets (CSV)."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from moacompress.core.printable import printable
from moacompress.core.shingles import OVERLAP_LIMIT, SHINGLE_WORDS
from moacompress.core.statistics import SIGNIFICANT, estimate_text, rounded_text
from moacompress.core.tables import Row, readable_bytes, section
from moacompress.report.headline import headline
from moacompress.rules.budget import format_length

RowGroup = dict[str, dict[str, Row]]
NAME_WIDTH = 20
CSV_COLUMNS = (
    "kind", "model", "task", "length", "metric", "value", "low", "high", "prompts", "kv_bytes", "kv_bytes_of_model",
    "tokens", "sink", "window", "formats", "p", "overlap", "documents",
)  # fmt: skip
"""`kind` is `result`, `difference` (the plan minus `model`) or `lm_eval`; `low` and `high` are the 95% interval, empty
below 5 prompts;
`p` is that of a difference; `documents` is n where several prompts are of one document."""
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


def evaluation_tables(report: Mapping[str, Any]) -> list[RenderableType]:
    """Returns the tables of an evaluation, each row with its prompts and KV bytes, models beside each other.

    Args:
        report: as `moacompress.evaluate` returns it.
    """
    marks = dict.fromkeys(((row["task"], row["length"]) for row in report["at_floor"]), "*")
    for row in report.get("seen_in_calibration", ()):
        place = row["task"], row["length"]
        marks[place] = f"{marks.get(place, '')}†"
    groups = _groups(report["results"])
    pooled = report["pooled"]
    tasks = [group for group in groups if "exact_match" in next(iter(group.values()))]
    texts = [group for group in groups if "ppl_late" in next(iter(group.values()))]
    shown: list[RenderableType] = [*headline(report), ""] if report["kinds"] else []
    columns: tuple[str, ...]
    twice = any(len(row.get("prompts_dense", ())) > 1 for row in report["results"])
    answered = ANSWERED_TWICE if twice else ANSWERED
    if tasks:
        columns = ("", "KV cache", "n", "exact match", "retention", "accuracy", "NLL")
        shown.append(section(TASK_TITLE.format(answered), columns, _lines(tasks, _task_line, marks)))
    if texts:
        columns = ("", "KV cache", "n", "first", "last", "KL", "same top")
        shown.append(section(TEXT_TITLE, columns, _lines(texts, _text_line, marks)))
    paired = [group for group in _groups(report["differences"]) if "exact_match" in next(iter(group.values()))]
    if paired:
        columns = ("", "n", "exact match", "accuracy", "NLL")
        shown.append(section(DIFFERENCE_TITLE, columns, _lines(paired, _difference_line, marks)))
    read = [group for group in _groups(report["differences"]) if "kl" in next(iter(group.values()))]
    if read:
        columns = ("", "n", "documents", "last", "KL", "same top")
        shown.append(section(TEXT_DIFFERENCE_TITLE, columns, _lines(read, _text_difference_line, marks)))
    if len(tasks) > 1:  # of one alone it would be the same again
        columns = ("", "KV cache", "n", "exact match", "retention", "NLL")
        shown.append(section(POOLED_TITLE, columns, _lines(_groups(pooled["results"]), _pooled_line, marks)))
        if pooled["differences"]:
            columns = ("", "exact match", "retention", "NLL")
            apart = _lines(_groups(pooled["differences"]), _pooled_difference_line, marks)
            shown.append(section(POOLED_DIFFERENCE_TITLE, columns, apart))
    tested = [row["metric"] != "ppl_early" for row in report["differences"]]
    tested += [row["metric"] != "accuracy" for row in pooled["differences"] if len(tasks) > 1]
    if sum(tested) > 1:
        shown.append(CHANCE_NOTE.format(sum(tested), f"{SIGNIFICANT * sum(tested):.2g}"))
    if report.get("lm_eval"):
        columns = ("task", "model", "n", "metric", "value")
        lines = [
            (row["task"], row["model"], str(row["prompts"]), row["metric"], _number(row, 3))
            for row in report["lm_eval"]
        ]
        shown.append(section("lm-evaluation-harness", columns, lines))
    if report["results"]:
        shown.append(overlap_note(report["results"]))
    return [*shown, FLOOR_NOTE] if report["at_floor"] else shown


def overlap_note(results: Iterable[Row]) -> str:
    """Returns in a sentence how much of what was measured on the plan's calibration has seen.

    Args:
        results: rows of an evaluation.
    """
    places: dict[str, float | None] = {}
    for row in results:
        at = "" if row["length"] is None else f"@{format_length(row['length'])}"
        places[f"{row['task']}{at}"] = row.get("overlap")
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
    """Returns the prompts that plan and dense answer differently well: the end of the question, the reference, both answers.

    Args:
        report: as `moacompress.evaluate` returns it.
    """
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
        lines.append(f"\n{row['task']}@{format_length(row['length'])}\n{said}")
    return lines


def _one_line(text: str) -> str:
    """Returns a text for a terminal on one line: what would move its cursor or colour it is spelt out."""
    return printable(text.strip().replace("\n", " ⏎ ").replace("\t", " "))


def csv_text(report: Mapping[str, Any]) -> str:
    """Returns all rows of an evaluation as CSV with the columns `CSV_COLUMNS`.

    Args:
        report: as `moacompress.evaluate` returns it.
    """
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


def _groups(rows: Iterable[Row]) -> list[RowGroup]:
    """Returns for each task and length, in order of appearance, the rows by model and metric."""
    found: dict[tuple[str, int], RowGroup] = {}
    for row in rows:
        group = found.setdefault((row["task"], row["length"]), {})
        group.setdefault(row["model"], {})[row["metric"]] = row
    return list(found.values())


def _lines(
    groups: Iterable[RowGroup], line: Callable[[Mapping[str, Row]], Sequence[str]], marks: Mapping[tuple[str, int], str]
) -> Iterator[Sequence[str]]:
    """Yields a line with the task and its length, and below it one line for each model."""
    for group in groups:
        first = next(iter(next(iter(group.values())).values()))
        mark = marks.get((first["task"], first["length"]), "")
        length = "" if first["length"] is None else f"@{format_length(first['length'])}"
        yield (f"{first['task']}{length}{mark}",)
        for model, metrics in group.items():
            yield (f"  {_short(model)}", *line(metrics))


def _short(model: str) -> str:
    return model if len(model) <= NAME_WIDTH else f"…{model[1 - NAME_WIDTH :]}"


def _task_line(metrics: Mapping[str, Row]) -> Sequence[str]:
    kept = metrics.get("retention")
    return (
        readable_bytes(metrics["exact_match"]["kv_bytes"]),
        _prompts(metrics["exact_match"]),
        _number(metrics["exact_match"], 2),
        "-" if kept is None else f"{_number(kept, 2)} ({kept['prompts']})",
        rounded_text(metrics["accuracy"]["value"], ".2f"),
        f"{metrics['nll']['value']:.3f}",
    )


def _pooled_difference_line(metrics: Mapping[str, Row]) -> Sequence[str]:
    return tuple(_signed(metrics[m]) if m in metrics else "-" for m in ("exact_match", "retention", "nll"))


def _pooled_line(metrics: Mapping[str, Row]) -> Sequence[str]:
    kept = metrics.get("retention")
    return (
        readable_bytes(metrics["exact_match"]["kv_bytes"]),
        _prompts(metrics["exact_match"]),
        _number(metrics["exact_match"], 2),
        "-" if kept is None else f"{_number(kept, 2)} ({kept['prompts']})",
        f"{metrics['nll']['value']:.3f}",
    )


def _text_line(metrics: Mapping[str, Row]) -> Sequence[str]:
    return (
        readable_bytes(metrics["ppl_late"]["kv_bytes"]),
        _prompts(metrics["ppl_late"]),
        f"{metrics['ppl_early']['value']:.1f}",
        _number(metrics["ppl_late"], 1),
        _number(metrics["kl"], 3),
        _number(metrics["top1_agreement"], 2),
    )


def _difference_line(metrics: Mapping[str, Row]) -> Sequence[str]:
    numbers = (_signed(metrics[metric]) for metric in ("exact_match", "accuracy", "nll"))
    return (_prompts(metrics["exact_match"]), *numbers)


def _text_difference_line(metrics: Mapping[str, Row]) -> Sequence[str]:
    row = metrics["kl"]
    numbers = (
        _signed(metrics[metric], digits) for metric, digits in (("ppl_late", 2), ("kl", 3), ("top1_agreement", 2))
    )
    return (str(row["prompts"]), str(row["documents"]), *numbers)


def _prompts(row: Row) -> str:
    """Returns how many prompts a row is of, and of how many documents where several are of one: these are its n."""
    count = row.get("documents", row["prompts"])
    return str(row["prompts"]) if count == row["prompts"] else f"{row['prompts']} of {count} documents"


def _number(row: Row, digits: int) -> str:
    """Returns `0.95 [0.87, 1.00]`; the value alone where there are too few prompts for an interval."""
    return estimate_text(row["value"], row["ci95"], f".{digits}f")


def _signed(row: Row, digits: int = 2) -> str:
    """Returns `-0.12* [-0.20, -0.04]`; the star where a test tells the two apart."""
    return estimate_text(row["value"], row["ci95"], f"+.{digits}f", "*" if row["p"] < SIGNIFICANT else "")
