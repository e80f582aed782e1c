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
    data = measure(place, "--tasks", "recall", "--against", ",".join(names), *SMALL)
    assert list(dict.fromkeys(row["model"] for row in data["results"])) == ["plan", *names]
    kv_bytes = {row["model"]: row["kv_bytes"] for row in data["results"]}
    assert all(kv_bytes[name] <= kv_bytes["plan"] < kv_bytes["dense"] for name in names[1:])
    shutil.copytree(place / "model", tmp_path / "model")
    alone = (tmp_path / "model", "--tasks", "recall", "--against", "per-layer", *SMALL)
    assert "made from a profile and there is none" in problem(*alone, exit_code=2)
    in_run = (place / "model", *alone[1:])
    again = [measure(*arguments) for arguments in (in_run, (*alone, "--profile", place / "profile"))]
    found = [{(row["model"], row["metric"]): row["value"] for row in each["results"]} for each in (data, *again)]
    assert len({each["per-layer", "nll"] for each in found}) == 1


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


def test_overwrite_measures_from_scratch(place: Path, tmp_path: Path) -> None:
    out, scores = (tmp_path / name for name in ("eval.json", "eval.scores.jsonl"))
    arguments = (place, "--against", "none", *SMALL, "-o", out)
    first = measure(*arguments)
    assert {row["task"] for row in first["results"]} == {"code-question", "second-question", "needle-noise"}
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in of_evaluation(out)}
    lines = scores.read_text().splitlines()
    scores.write_text("\n".join(lines).replace('"nll":', '"nll":1'))
    changed = scores.read_text()
    assert measure(*arguments) != first  # as it resumes from there
    problem(*arguments, "--tasks", "key-value", "--lengths", "16", "--overwrite", exit_code=1)
    assert scores.read_text() == changed  # a request that cannot be costs nothing
    others = [{**first, "checkpoint": {**first["checkpoint"], "plan": "another"}}, []]
    for text in (*map(json.dumps, others), "no JSON"):  # a result of something else
        out.write_text(text)
        message = problem(*arguments, exit_code=1)
        assert "eval.json exists already and is not an evaluation of this checkpoint; " in message
        assert "--overwrite" in message
        assert out.read_text() == text
    assert measure(*arguments, "--overwrite") == json.loads(out.read_text()) == first
    assert scores.read_text().splitlines() == lines
    with own_file(out):
        assert "eval.json is in use" in problem(*arguments, exit_code=1)


def test_tables(place: Path, prose: Path) -> None:
    result = invoke(place, "--text", prose, "--lengths", "768", "--prompts", "6", "-q")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith(
        "Kinds of prompts that no calibration has (code-question, second-question; 768 tokens): "
    )
    assert lines[1].startswith("Kinds that the plan was calibrated on (needle-noise; 768 tokens): ")
    assert lines[2].startswith("Not measured: prompts beyond 768 tokens, ")
    assert max(map(len, lines[3:])) <= 100
    for part in ("needle-noise@768", "text@768", "  dense", "  uniform", "exact match", "same top"):
        assert part in result.stdout
    assert sum(line.strip().startswith("plan") for line in lines) == 6


def test_questions_and_answers_are_kept_and_shown(place: Path, tmp_path: Path) -> None:
    """Those of dense and of the plan, and they are there again where all scores are taken from the records."""
    out = tmp_path / "eval.json"
    arguments = (place, "--tasks", "code-question,line-lookup", "--against", "dense,uniform", *SMALL, "-o", out)
    said = invoke(*arguments).stderr
    assert re.search(r"This takes about .* for \d+ answers\.", said)
    assert said.index("This takes about") < said.index("evaluating")
    kept = json.loads(out.read_text())
    rows = kept["answers"]
    assert [row["task"] for row in rows] == ["code-question"] * 2 + ["line-lookup"] * 2
    for row in rows:
        assert row.keys() == {
            "task", "length", "question", "references", "dense", "plan", "dense_match", "plan_match",
        }  # fmt: skip
        assert row["question"]
        assert row["dense"]
    result = invoke(*arguments, "--show-failures")
    assert "This takes about" not in result.stderr  # nothing is left to do
    assert "0 of 4 prompts are answered differently well" in result.stdout
    assert json.loads(out.read_text())["answers"] == rows


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


@pytest.mark.heavy
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
    out, table = tmp_path / "eval.json", tmp_path / "t.csv"
    shown = invoke(place, "--lm-eval", tmp_path / "even.yaml", "--prompts", "4", "--csv", table, "-o", out, "-q")
    assert "lm-evaluation-harness" in shown.stdout
    assert "loglikelihood" not in shown.stderr  # of its bars
    data = json.loads(out.read_text())
    assert data["results"] == []
    rows = [(row["model"], row["task"], row["metric"], row["prompts"]) for row in data["lm_eval"]]
    assert rows == [("plan", "even", "acc", 4), ("dense", "even", "acc", 4)]
    assert "lm_eval,plan,even" in table.read_text()
    measure(place, "--tasks", "needle-noise", "--lengths", "768", "--prompts", "2", "-o", out)
    result = invoke(place, "--tasks", "needle-noise", "--lengths", "512", "--prompts", "2", "-o", out)
    assert "had numbers that were not asked for now (plan on needle-noise@768" in result.stderr
    kept = json.loads(out.read_text())
    assert kept["lm_eval"] == data["lm_eval"]  # they took long, and are not among the scores
    assert kept["results"]


def test_tasks_are_listed() -> None:
    found = {row["task"]: row["needs"] for row in json.loads(invoke("--list-tasks", "--json").stdout)["tasks"]}
    assert found["needle-noise"] == ""
    assert found["needle-prose"] == found["text"] == "--text"
    assert found["niah-single-1"] == "the extra eval"
    assert found["qa-squad"] == "--squad, the extra eval"
    shown = invoke("--list-tasks", "-q").stdout
    assert "needle-noise" in shown
