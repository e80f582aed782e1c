"""The tables that runs end with."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console, RenderableType

from moacompress.report.summary import harm_table, results_table, summary_tables

SUMMARY: dict[str, Any] = {
    "model": "some/model",
    "budget": ["25%"],
    "reference_length": 1024,
    "kv_bytes": {"dense": 4 * 2**20, "planned": 2**20, "measured": 2**20},
    "quality": {
        "needle-noise@1024": {"dense": 1.0, "plan": 0.9, "prompts": 20, "nll": {"dense": 0.01, "plan": 0.02}},
    },
    "seconds": {"profile": 10.4, "search": 20.0},
}


def shown(*parts: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=100, highlight=False)
    for part in parts:
        console.print(part, markup=False)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 100
    return str(text)


def test_a_summary_with_and_without_a_uniform_window() -> None:
    text = shown(*summary_tables(SUMMARY))
    for part in ("some/model, budget 25%", "at 1k tokens", "1.0 MiB", "25.0%", "0.90 (0.020)", "profile 10 s"):
        assert part in text
    row = next(line for line in text.splitlines() if "needle-noise" in line).split()
    assert row == ["needle-noise@1024", "1.00", "(0.010)", "-", "0.90", "(0.020)", "20"]


def test_harm_names_what_was_measured() -> None:
    text = shown(harm_table({"plan": 0.01, "trial0": 0.02, "uniform": None}, {"512": {"plan": 1, "dense": 4}}))
    assert "KV bytes 25.0% at 512" in text
    lines = [line for line in text.splitlines() if "plan  " in line or "uniform" in line]
    assert [line.split()[-1] for line in lines] == ["0.01", "0.02", "-"]


def test_results_fit_on_a_line() -> None:
    row = {
        "model": "uniform",
        "task": "multi-needle-noise",
        "length": 4096,
        "metric": "exact_match",
        "value": 0.5,
        "ci95": [0.25, 0.75],
        "prompts": 100,
        "kv_bytes": 25165824,
    }
    text = shown(results_table([row, {**row, "ci95": None, "kv_bytes": None}]))
    lines = [line for line in text.splitlines() if "multi-needle" in line]
    assert "0.250-0.750" in lines[0]
    assert "24.0 MiB" in lines[0]
    assert lines[1].split()[-3:] == ["-", "100", "-"]
