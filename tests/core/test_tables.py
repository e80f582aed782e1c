"""Tables on narrow and wide consoles: every number stands in one line, with its interval in brackets."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from moacompress.core.tables import Columns, Table, error_text, estimate_text, facts, p_text
from moacompress.report.bench_tables import bench_tables
from moacompress.report.evaluation_tables import evaluation_tables

SIDES = ("plan", "full_span", "dense", "dense_best")


def lines(shown: list[RenderableType], width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    for part in shown:
        if not isinstance(part, str):
            console.print(part)
    found = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in found)
    return [line.rstrip() for line in found]


def test_an_interval_has_brackets() -> None:
    assert estimate_text(0.951, (0.87, 1.0)) == "0.95 [0.87, 1.00]"
    assert estimate_text(-0.12, (-0.2, 0.04), "+.2f") == "-0.12 [-0.20, +0.04]"
    assert estimate_text(0.5, None, ".2f", "*") == "0.50*"
    assert (error_text(0.1, None), error_text(0.1, 0.02)) == ("0.1", "0.1 ± 0.02")  # a single sample has no error
    assert (p_text(0.0001), p_text(0.25), p_text(1.0)) == ("p < .001", "p .25", "p 1")


def test_a_long_path_is_shown_whole() -> None:
    path = "/models/" + "a-name" * 20
    assert path in "".join(line.removeprefix("model").strip() for line in lines([facts("Model", {"model": path})], 60))


def test_columns_without_room_follow_in_a_table_of_their_own() -> None:
    table = Table("Title", ("", "a", "a longer heading", "c"), [("row 1", "1" * 9, "2" * 9, "3" * 9), ("row 2",)])
    wide, narrow = lines([table], 80), lines([table], 36)
    assert sum("row 1" in line for line in wide) == 1
    assert sum("row 1" in line for line in narrow) == 2
    assert sum("row 2" in line for line in narrow) == 2
    assert [line for line in narrow if "heading" in line and "a longer" not in line]  # wrapped
    text = "\n".join(narrow)
    assert all(text.count(digit * 9) == 1 for digit in "123")


def test_the_same_table_as_markdown() -> None:
    columns: Columns = {"name": str, "KL(dense || model)": lambda value: f"{value:.2f}"}
    assert Table.of("Title", columns, (1, 25), "A note.").markdown() == (
        "| name | KL(dense \\|\\| model) |\n| --- | ---: |\n| 1 | 1.00 |\n| 25 | 25.00 |\n\nA note."
    )
    shown = "\n".join(lines([Table.of("Title", columns, (1, 25), "A note.")], 80))
    assert shown.startswith("Title\n")
    assert "25.00" in shown
    assert shown.endswith("A note.")


def bench_report(length: int = 32768) -> dict[str, Any]:
    def row(phase: str) -> dict[str, Any]:
        values = {"plan": 103.2, "full_span": 112.5, "dense": 1210.0, "dense_best": 1130.0}
        return {
            "phase": phase, "length": length, "batch": 16, "dtype": "bfloat16", "repeats": 20, "trace": None,
            "weight_bytes": 3 << 30, "kv_bytes_plan": 3 << 27, "kv_bytes_dense": 24 << 27, "byte_ratio": 1.08,
            "bits": {"keys": 10.0, "values": 6.25}, "kernel": None, "load_per_core": None, "routes": {}, "graphs": {},
            "dense_best_refused": None, "dense_best": None,
            "spread_ms": {side: (value * 0.9, value * 1.1) for side, value in values.items()},
            "speedup": {side: {"value": 0.97, "ci95": (0.88, 11.23)} for side in SIDES[1:]},
            **{f"{side}_ms": value for side, value in values.items()},
            **{f"peak_bytes_{side}": 9 << 30 for side in SIDES},
        }  # fmt: skip

    machine = {"cpu": "a processor", "threads": 2, "torch": "2", "isa": "", "kernel": ""}
    return {"runs": [row("decode"), row("prefill")], "environment": machine, "break_even": []}


def evaluation_report() -> dict[str, Any]:
    def row(model: str, metric: str, value: float) -> dict[str, Any]:
        about = {"task": "needle-noise", "length": 2048, "model": model, "kv_bytes": 24 << 20, "prompts": 440}
        return {**about, "metric": metric, "value": value, "ci95": (value - 0.11, value + 0.05)}

    names = ("plan", "dense", "uniform-elastic:seen-123456")
    metrics = {"exact_match": 0.95, "retention": 0.94, "accuracy": 0.97, "nll": 0.123}
    rows = [row(name, metric, value) for name in names for metric, value in metrics.items()]
    apart = [row | {"p": 0.5} for row in rows if row["model"] != "plan"]
    pooled: dict[str, Any] = {"results": [], "differences": []}
    return {"results": rows, "differences": apart, "at_floor": [], "pooled": pooled, "kinds": []}


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("report", ["bench", "eval"])
def test_results_are_not_broken(report: str, width: int) -> None:
    shown = bench_tables(bench_report()) if report == "bench" else evaluation_tables(evaluation_report())
    found = lines(shown, width)
    text = "\n".join(found)
    wanted = (
        {"103 [92.9, 114]": 1, "1210 [1089, 1331]": 1, "0.97* [0.88, 11.23]": 6, "384.0, 12.5%": 2, "9,216": 8}
        if report == "bench"
        else {"0.95 [0.84, 1.00]": 3, "0.94 [0.83, 0.99] (440)": 3, "+0.95 [+0.84, +1.00]": 2, "24.0 MiB": 3}
    )
    for number, count in wanted.items():
        assert text.count(number) == count, (number, text)
