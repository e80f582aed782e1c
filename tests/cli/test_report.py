"""The tables that runs end with."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console, RenderableType

from moacompress.report.evaluation_tables import csv_text, evaluation_tables
from moacompress.report.page.search_figures import history_picture
from moacompress.report.search_tables import explanation_tables, step_rows
from moacompress.report.summary_tables import kl_table, summary_tables

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


def test_kl_names_what_was_measured() -> None:
    text = shown(kl_table({"plan": 0.01, "trial0": 0.02, "uniform": None}, {"512": {"plan": 1, "dense": 4}}))
    assert "KV bytes 25.0% at 512" in text
    lines = [line for line in text.splitlines() if "plan  " in line or "uniform" in line]
    assert [line.split()[-1] for line in lines] == ["0.01", "0.02", "-"]


def result(model: str, metric: str, value: float, **changes: Any) -> dict[str, Any]:
    row = {"model": model, "task": "multi-needle-noise", "length": 4096, "metric": metric, "value": value}
    row |= {"ci95": [value - 0.25, value + 0.25], "prompts": 100, "kv_bytes": 25165824, "tokens": 4000}
    return row | changes


def test_models_are_beside_each_other_on_lines_that_fit() -> None:
    names = ("plan", "dense", "uniform-elastic", "a/folder/with/a/very/long/name/model")
    metrics = ("exact_match", "accuracy", "nll", "retention")
    rows = [result(name, metric, 0.5) for name in names for metric in metrics]
    rows = [row for row in rows if (row["model"], row["metric"]) != ("plan", "retention")]
    paired = [result(name, metric, -0.5, kv_bytes_of_model=1) for name in names[1:] for metric in metrics[:3]]
    floor = [{"task": "multi-needle-noise", "length": 4096}]
    text = shown(*evaluation_tables({"results": rows, "differences": paired, "at_floor": floor}))
    lines = text.splitlines()
    assert sum("multi-needle-noise@4k*" in line for line in lines) == 2
    at = next(index for index, line in enumerate(lines) if "@4k*" in line)
    plan, dense, elastic, folder = lines[at + 1 : at + 5]
    assert plan.split() == ["plan", "24.0", "MiB", "100", "0.50", "0.25-0.75", "-", "0.50", "0.500"]
    assert "0.50 0.25-0.75 (100)" in dense
    assert elastic.strip().startswith("uniform-elastic ")
    assert folder.strip().startswith("…ery/long/name/model ")
    assert "-0.50 [-0.75 -0.25]" in text
    assert "no evidence" in lines[-1]


def test_pooled_prompts_have_tables_of_their_own() -> None:
    names = ("plan", "a/folder/with/a/very/long/name/model")
    row = {"task": "all tasks", "length": None, "prompts": 240}
    rows = [result(name, metric, 0.5, **row) for name in names for metric in ("exact_match", "nll", "retention")]
    paired = [result(names[1], metric, -0.5, **row) for metric in ("exact_match", "nll", "retention")]
    report = {"results": [], "differences": [], "at_floor": [], "pooled": {"results": rows, "differences": paired}}
    text = shown(*evaluation_tables(report))
    assert "0.50 0.25-0.75 (240)" in text
    assert "…ery/long/name/model" in text
    assert text.count("-0.50 [-0.75 -0.25]") == 3
    assert (
        sum(line.startswith(("result,plan,all tasks,,", "difference,a/")) for line in csv_text(report).splitlines())
        == 6
    )


def test_csv_has_every_row() -> None:
    report = {
        "results": [result("plan", "nll", 0.5, sink=4)],
        "differences": [result("dense", "nll", 0.1)],
        "lm_eval": [
            {"model": "plan", "task": "t", "length": None, "metric": "acc", "value": 1.0, "ci95": None, "prompts": 3}
        ],
    }
    head, first, second, third = csv_text(report).splitlines()
    assert head.startswith("kind,model,task,length,metric,value,low,high,prompts,kv_bytes")
    assert first == "result,plan,multi-needle-noise,4096,nll,0.5,0.25,0.75,100,25165824,,4000,4,,,"
    assert second.startswith("difference,dense,")
    assert third == "lm_eval,plan,t,,acc,1.0,,,3,,,,,,,"


def test_what_was_not_kept_though_its_kl_is_lower_has_a_reason() -> None:
    def stage(name: str, kept: bool, gain: float | None, noise: float | None) -> dict[str, Any]:
        return {"name": name, "harm": 0.1, "log_ratio": -0.1, "kept": kept, "gain": gain, "noise": noise}

    rows = step_rows(
        {
            "stages": [
                stage("surrogate", True, None, None),
                stage("study", False, -0.03, 0.05),
                stage("round 1", True, -0.2, 0.05),
                stage("moves", False, 0.02, 0.0),
                stage("rest", True, 0.01, 0.02),
                {"name": "of an older search", "harm": 0.1, "log_ratio": -0.1, "kept": False},
            ]
        }
    )
    assert [row[-1] for row in rows] == [
        "yes",
        "no: gain within noise (-3.0% \u00b1 5.1%)",
        "yes",
        "no: not better than the plan before",
        "yes: worse by less than noise (+1.0% \u00b1 2.0%)",
        "no",
    ]
    trials = [
        {"trial": 0, "harm": 0.1, "pruned": False, "kept": True, "gain": 0.0, "noise": 0.0},
        {"trial": 1, "harm": 0.09, "pruned": False, "kept": False, "gain": -0.03, "noise": 0.05},
        {"trial": 2, "harm": 0.3, "pruned": True, "kept": False, "gain": 1.0, "noise": 0.1},
        {"trial": 3, "harm": 0.2, "pruned": False, "kept": False, "gain": 0.6, "noise": 0.1},
    ]
    picture = history_picture({"trials": trials})
    assert picture is not None
    assert [row[-1] for row in picture.rows] == ["kept", "gain within noise (-3.0% \u00b1 5.1%)", "given up", ""]
    assert "above 2 standard errors" in picture.note
    older = history_picture({"trials": [{"trial": n, "harm": 0.1, "pruned": n == 1} for n in range(3)]})
    assert older is not None
    assert [row[-1] for row in older.rows] == ["", "given up", ""]


def test_an_explanation_says_where_the_bytes_are() -> None:
    rule = {"sink": 4, "alpha": 64, "beta_q": 0}
    head = {"layer": 1, "kv_head": 0, "kept": 80, "of": 512, "saves": 0.25}
    told: dict[str, Any] = {
        "stages": [{"name": "surrogate", "harm": 0.1, "log_ratio": 0.0, "kept": True}],
        "heads": [
            {**head, "rule": {**rule, "key_format": "int8", "value_format": "int4"}},
            {**head, "rule": rule},  # of an older search
            {**head, "layer": 9, "saves": -0.125, "rule": rule},
        ],
        "knobs": {"precision": 1.0},
        "predicted": {"pairs": [], "spearman": None},
        "kinds": {"answer": 0.125, "text": 0.5},
        "formats": {
            "bits": {"keys": 8.5, "values": 4.5},
            "pairs": [
                {"key_format": "int8", "value_format": "int4", "kv_heads": 5, "kv_bytes": 300},
                {"key_format": "native", "value_format": "native", "kv_heads": 1, "kv_bytes": 100},
            ],
        },
    }
    text = shown(*explanation_tables(told))
    assert "8.5 bits in keys and 4.5 in values" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["int8", "int4", "5", "75%"] in rows
    assert ["native", "native", "1", "25%"] in rows
    assert any(row[:5] == ["1", "0", "80", "512", "int8/int4"] for row in rows)
    assert any(row[:5] == ["1", "0", "80", "512", "native/native"] for row in rows)
    assert not any(row[:1] == ["9"] for row in rows)  # its bytes are worth less than the average head's
    assert "worth most" not in shown(*explanation_tables({**told, "heads": told["heads"][2:]}))
    assert "answer 0.12, text 0.5" in text
    plain = {key: value for key, value in told.items() if key not in ("kinds", "formats")}
    assert "bits" not in shown(*explanation_tables(plain))
