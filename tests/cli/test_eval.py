"""`moacompress eval` on a tiny run: what it prints and writes, and how it fails."""

from __future__ import annotations

import csv
import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest

from moacompress.core.artefact_names import of_evaluation
from moacompress.core.lock_holders import own_file
from tests.cli import commands

invoke = partial(commands.invoke, "eval")
measure = partial(commands.answer, "eval")
problem = partial(commands.problem, "eval")
SMALL = ("--lengths", "768", "--prompts", "2")


def test_all_baselines_with_the_profile_of_the_run(place: Path, tmp_path: Path) -> None:
    names = ["dense", "uniform", "uniform-elastic", "per-layer", "split", "uniform:4"]
    for path in (place, place / "model"):
        data = measure(path, "--tasks", "recall", "--against", ",".join(names), *SMALL)
        assert list(dict.fromkeys(row["model"] for row in data["results"])) == ["plan", *names]
        kv_bytes = {row["model"]: row["kv_bytes"] for row in data["results"]}
        assert all(kv_bytes[name] <= kv_bytes["plan"] < kv_bytes["dense"] for name in names[1:])
    shutil.copytree(place / "model", tmp_path / "model")
    arguments = (tmp_path / "model", "--tasks", "recall", "--against", "per-layer", *SMALL)
    assert "made from a profile and there is none" in problem(*arguments, exit_code=2)
    again = measure(*arguments, "--profile", place / "profile")
    row = {row["model"]: row["value"] for row in data["results"] if row["metric"] == "nll"}
    assert row["per-layer"] == next(
        r["value"] for r in again["results"] if r["model"] == "per-layer" and r["metric"] == "nll"
    )


def test_files(place: Path, prose: Path, tmp_path: Path) -> None:
    out, table = tmp_path / "eval.json", tmp_path / "eval.csv"
    data = measure(place, "--tasks", "key-value,text", "--text", prose, *SMALL, "-o", out, "--csv", table)
    assert json.loads(out.read_text()) == data
    assert measure(place, "--tasks", "key-value,text", "--text", prose, *SMALL, "-o", out, "--csv", table) == data
    assert (tmp_path / "eval.scores.jsonl").is_file()
    rows = list(csv.DictReader(table.open()))
    pooled = data["pooled"]
    assert len(rows) == sum(len(part[name]) for part in (data, pooled) for name in ("results", "differences"))
    for row, result in zip(rows, data["results"], strict=False):
        assert (row["kind"], row["model"], row["metric"]) == ("result", result["model"], result["metric"])
        assert [row[name] and float(row[name]) for name in ("value", "low", "high")] == [
            result["value"],
            *(result["ci95"] or ("", "")),
        ]
        assert (int(row["prompts"]), int(row["kv_bytes"])) == (result["prompts"], result["kv_bytes"])
    assert rows[-1]["kind"] == "difference"


def test_overwrite_measures_anew(place: Path, tmp_path: Path) -> None:
    out, scores = (tmp_path / name for name in ("eval.json", "eval.scores.jsonl"))
    arguments = (place, "--against", "none", *SMALL, "-o", out)
    first = measure(*arguments)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in of_evaluation(out)}
    lines = scores.read_text().splitlines()
    scores.write_text("\n".join(lines).replace('"nll":', '"nll":1'))
    changed = scores.read_text()
    assert measure(*arguments) != first  # as it resumes from there
    problem(*arguments, "--tasks", "key-value", "--lengths", "16", "--overwrite", exit_code=1)
    assert scores.read_text() == changed  # a request that cannot be costs nothing
    assert measure(*arguments, "--overwrite") == first
    assert scores.read_text().splitlines() == lines


def test_a_result_of_something_else_is_not_touched_without_overwrite(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    arguments = (place, "--against", "none", *SMALL, "-o", out)
    first = measure(*arguments)
    others = [{**first, "checkpoint": {**first["checkpoint"], "plan": "another"}}, {"rows": 1}, [], "results"]
    for text in (*map(json.dumps, others), "no JSON"):
        out.write_text(text)
        message = problem(*arguments, exit_code=1)
        assert "eval.json exists already and is not an evaluation of this checkpoint; " in message
        assert "--overwrite" in message
        assert out.read_text() == text
    assert measure(*arguments, "--overwrite") == json.loads(out.read_text()) == first
    with own_file(out):
        assert "eval.json is in use" in problem(*arguments, exit_code=1)


def test_text_is_measured_where_it_is_given(place: Path, prose: Path) -> None:
    def tasks(*arguments: str | Path) -> set[str]:
        return {row["task"] for row in measure(place, "--against", "none", *SMALL, *arguments)["results"]}

    defaults = {"code-question", "second-question", "needle-noise"}
    assert tasks("--text", prose) == {*defaults, "text"}
    assert tasks("--text", prose, "--tasks", "needle-prose") == {"needle-prose"}
    assert tasks() == defaults


def test_tables(place: Path, prose: Path) -> None:
    result = invoke(place, "--text", prose, "--lengths", "768", "--prompts", "20", "-q")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith(
        "Kinds of prompts that no calibration has (code-question, second-question; 768 tokens): "
    )
    assert lines[1].startswith("Kinds that the plan was calibrated on (needle-noise; 768 tokens): ")
    assert lines[2].startswith("Not measured: prompts beyond 768 tokens, ")
    assert max(map(len, lines[3:])) <= 100
    for part in ("needle-noise@768*", "text@768", "  dense", "  uniform", "exact match", "same top", "no evidence"):
        assert part in result.stdout
    assert sum(line.strip().startswith("plan") for line in lines) == 6


def test_questions_and_answers_are_kept_and_shown(place: Path, tmp_path: Path) -> None:
    """Those of dense and of the plan, and they are there again where all scores are taken from the records."""
    out = tmp_path / "eval.json"
    arguments = (place, "--tasks", "code-question,line-lookup", "--against", "dense,uniform", *SMALL, "-o", out)
    rows = measure(*arguments)["answers"]
    assert [row["task"] for row in rows] == ["code-question"] * 2 + ["line-lookup"] * 2
    for row in rows:
        assert row.keys() == {
            "task", "length", "question", "references", "dense", "plan", "dense_match", "plan_match",
        }  # fmt: skip
        assert row["question"]
        assert row["dense"]
    assert measure(*arguments)["answers"] == rows
    kept = json.loads(out.read_text())
    result = invoke(*arguments, "--show-failures", "-q")
    assert "0 of 4 prompts are answered differently well" in result.stdout
    assert kept["answers"] == rows


def test_how_long_it_takes_is_said_before_it_starts(place: Path, tmp_path: Path) -> None:
    arguments = (place, "--tasks", "recall", *SMALL, "-o", tmp_path / "eval.json")
    said = invoke(*arguments).stderr
    assert re.search(r"This takes about .* for \d+ answers\.", said)
    assert said.index("This takes about") < said.index("evaluating")
    assert "This takes about" not in invoke(*arguments).stderr  # nothing is left to do


def test_fail_under(place: Path) -> None:
    arguments = (place, "--tasks", "needle-noise", "--against", "none", *SMALL)
    assert measure(*arguments, "--fail-under", "exact_match=0")["failures"] == []
    result = invoke(*arguments, "--fail-under", "exact_match=0.5, needle-noise@768:retention=0.9", "--json", "-q")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["failures"] == [
        "needle-noise@768:exact_match is 0.000, less than 0.5",
        "needle-noise@768:retention=0.9 (nothing measured)",
    ]
    lines = [line for line in result.stderr.splitlines() if line.startswith("moacompress: ")]
    assert len(lines) == 1
    assert lines[0].startswith("moacompress: below the threshold: needle-noise@768:exact_match is 0.000")


def test_lm_eval(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"q": f"is {n} even", "a": n % 2}) + "\n" for n in range(6))
    )
    task = {
        "task": "even",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}:",
        "doc_to_target": "a",
        "doc_to_choice": ["yes", "no"],
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "even.yaml").write_text(json.dumps(task))
    data = measure(place, "--lm-eval", tmp_path / "even.yaml", "--prompts", "4", "--csv", tmp_path / "t.csv")
    assert data["results"] == []
    rows = [(row["model"], row["task"], row["metric"], row["prompts"]) for row in data["lm_eval"]]
    assert rows == [("plan", "even", "acc", 4), ("dense", "even", "acc", 4)]
    assert "lm_eval,plan,even" in (tmp_path / "t.csv").read_text()
    out = tmp_path / "eval.json"
    measure(place, "--lm-eval", tmp_path / "even.yaml", "--prompts", "4", "-o", out)
    measure(place, "--tasks", "needle-noise", "--lengths", "768", "--prompts", "2", "-o", out)
    result = invoke(place, "--tasks", "needle-noise", "--lengths", "512", "--prompts", "2", "-o", out)
    assert "had numbers that were not asked for now (plan on needle-noise@768" in result.stderr
    kept = json.loads(out.read_text())
    assert kept["lm_eval"] == data["lm_eval"]  # they took long, and are not among the scores
    assert kept["results"]
    shown = invoke(place, "--lm-eval", tmp_path / "even.yaml", "--prompts", "4", "-q")
    assert "lm-evaluation-harness" in shown.stdout
    assert "loglikelihood" not in shown.stderr  # of its bars
    assert "acc" in shown.stdout


def test_tasks_are_listed() -> None:
    found = {row["task"]: row["needs"] for row in json.loads(invoke("--list-tasks", "--json").stdout)["tasks"]}
    assert found["needle-noise"] == ""
    assert found["needle-prose"] == found["text"] == "--text"
    assert found["niah-single-1"] == "the extra eval"
    assert found["qa-squad"] == "--squad, the extra eval"
    shown = invoke("--list-tasks", "-q").stdout
    assert "needle-noise" in shown


def test_a_threshold_may_be_of_all_that_is_measured(place: Path, prose: Path) -> None:
    """`all` has the tasks of prose where there is some."""
    ask = (place, "--tasks", "all", "--text", prose, "--fail-under", "needle-prose:accuracy=0.1")
    assert "needle-prose" not in problem(*ask, "--lengths", "8", exit_code=1)
