"""What an evaluation came to, for people (tables) and for spreadsheets (CSV)."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from moacompress.core.tables import Row, readable_bytes, section
from moacompress.rules.budget import format_length

RowGroup = dict[str, dict[str, Row]]
NAME_WIDTH = 20
CSV_COLUMNS = (
    "kind", "model", "task", "length", "metric", "value", "low", "high", "prompts", "kv_bytes", "kv_bytes_of_model",
    "tokens", "sink", "window", "formats",
)  # fmt: skip
"""`kind` is `result`, `difference` (the plan minus `model`) or `lm_eval`; `low` and `high` are the 95% interval."""
TASK_TITLE = "Tasks, mean and 95% interval over n prompts; retention: of those that {} (how many)"
ANSWERED, ANSWERED_TWICE = "dense gets right", "dense gets right by our kernels and by transformers' attention"
TEXT_TITLE = "Long text: perplexity of first and last half; KL to dense and same top token in the last (n windows)"
DIFFERENCE_TITLE = "This plan minus the other model, paired, with 95% interval"
POOLED_TITLE = "All prompts of all tasks and lengths together; retention: of those that {} (how many)"
POOLED_DIFFERENCE_TITLE = "All prompts: this plan minus the other model, paired, with 95% interval"
FLOOR_NOTE = "* Dense cannot do this itself (its interval ends below 0.2): no evidence for or against a plan."


def evaluation_tables(report: Mapping[str, Any]) -> list[RenderableType]:
    """Returns the tables of an evaluation, each row with its prompts and KV bytes, models beside each other.

    Args:
        report: as `moacompress.evaluate` returns it.
    """
    floor = {(row["task"], row["length"]) for row in report["at_floor"]}
    groups = _groups(report["results"])
    tasks = [group for group in groups if "exact_match" in next(iter(group.values()))]
    texts = [group for group in groups if "ppl_late" in next(iter(group.values()))]
    shown: list[RenderableType] = []
    columns: tuple[str, ...]
    twice = any(len(row.get("prompts_dense", ())) > 1 for row in report["results"])
    answered = ANSWERED_TWICE if twice else ANSWERED
    if tasks:
        columns = ("", "KV cache", "n", "exact match", "retention", "accuracy", "NLL")
        shown.append(section(TASK_TITLE.format(answered), columns, _lines(tasks, _task_line, floor)))
    if texts:
        columns = ("", "KV cache", "n", "first", "last", "KL", "same top")
        shown.append(section(TEXT_TITLE, columns, _lines(texts, _text_line, floor)))
    paired = [group for group in _groups(report["differences"]) if "exact_match" in next(iter(group.values()))]
    if paired:
        columns = ("", "n", "exact match", "accuracy", "NLL")
        shown.append(section(DIFFERENCE_TITLE, columns, _lines(paired, _difference_line, floor)))
    if report.get("pooled"):
        columns = ("", "KV cache", "n", "exact match", "retention", "NLL")
        shown.append(
            section(
                POOLED_TITLE.format(answered),
                columns,
                [_pooled_line(m) for m in _groups(report["pooled"]["results"])[0].items()],
            )
        )
        apart = [
            (
                _short(model),
                *(_signed(metrics[m]) if m in metrics else "-" for m in ("exact_match", "retention", "nll")),
            )
            for group in _groups(report["pooled"]["differences"])
            for model, metrics in group.items()
        ]
        if apart:
            shown.append(section(POOLED_DIFFERENCE_TITLE, ("", "exact match", "retention", "NLL"), apart))
    if report.get("lm_eval"):
        columns = ("task", "model", "n", "metric", "value")
        lines = [
            (row["task"], row["model"], str(row["prompts"]), row["metric"], _number(row, 3))
            for row in report["lm_eval"]
        ]
        shown.append(section("lm-evaluation-harness", columns, lines))
    return [*shown, FLOOR_NOTE] if floor else shown


def csv_text(report: Mapping[str, Any]) -> str:
    """Returns all rows of an evaluation as CSV with the columns `CSV_COLUMNS`.

    Args:
        report: as `moacompress.evaluate` returns it.
    """
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    pooled = report.get("pooled", {})
    parts = {
        "result": [*report["results"], *pooled.get("results", ())],
        "difference": [*report["differences"], *pooled.get("differences", ())],
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
    groups: Iterable[RowGroup], line: Callable[[Mapping[str, Row]], Sequence[str]], floor: set[tuple[str, int]]
) -> Iterator[Sequence[str]]:
    """Yields a line with the task and its length, and below it one line for each model."""
    for group in groups:
        first = next(iter(next(iter(group.values())).values()))
        star = "*" if (first["task"], first["length"]) in floor else ""
        yield (f"{first['task']}@{format_length(first['length'])}{star}",)
        for model, metrics in group.items():
            yield (f"  {_short(model)}", *line(metrics))


def _short(model: str) -> str:
    return model if len(model) <= NAME_WIDTH else f"…{model[1 - NAME_WIDTH :]}"


def _task_line(metrics: Mapping[str, Row]) -> Sequence[str]:
    kept = metrics.get("retention")
    return (
        readable_bytes(metrics["exact_match"]["kv_bytes"]),
        str(metrics["exact_match"]["prompts"]),
        _number(metrics["exact_match"], 2),
        "-" if kept is None else f"{_number(kept, 2)} ({kept['prompts']})",
        f"{metrics['accuracy']['value']:.2f}",
        f"{metrics['nll']['value']:.3f}",
    )


def _pooled_line(item: tuple[str, Mapping[str, Row]]) -> Sequence[str]:
    model, metrics = item
    kept = metrics.get("retention")
    return (
        _short(model),
        readable_bytes(metrics["exact_match"]["kv_bytes"]),
        str(metrics["exact_match"]["prompts"]),
        _number(metrics["exact_match"], 2),
        "-" if kept is None else f"{_number(kept, 2)} ({kept['prompts']})",
        f"{metrics['nll']['value']:.3f}",
    )


def _text_line(metrics: Mapping[str, Row]) -> Sequence[str]:
    return (
        readable_bytes(metrics["ppl_late"]["kv_bytes"]),
        str(metrics["ppl_late"]["prompts"]),
        f"{metrics['ppl_early']['value']:.1f}",
        _number(metrics["ppl_late"], 1),
        _number(metrics["kl"], 3),
        _number(metrics["top1_agreement"], 2),
    )


def _difference_line(metrics: Mapping[str, Row]) -> Sequence[str]:
    numbers = (_signed(metrics[metric]) for metric in ("exact_match", "accuracy", "nll"))
    return (str(metrics["exact_match"]["prompts"]), *numbers)


def _number(row: Row, digits: int) -> str:
    """Returns `0.95 0.87-1.00`."""
    if row["ci95"] is None:
        return f"{row['value']:.{digits}f}"
    low, high = (f"{end:.{digits}f}" for end in row["ci95"])
    return f"{row['value']:.{digits}f} {low}-{high}"


def _signed(row: Row) -> str:
    """Returns `-0.12 [-0.20 -0.04]`."""
    low, high = row["ci95"]
    return f"{row['value']:+.2f} [{low:+.2f} {high:+.2f}]"
