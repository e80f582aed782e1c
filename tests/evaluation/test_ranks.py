"""An evaluation by two processes of `torchrun` is that of one, and takes up what one left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moacompress.cli import app
from tests.preloaded import Preloaded

TASK = {
    "task": "even",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{q}}:",
    "doc_to_target": "a",
    "doc_to_choice": ["yes", "no", "no, never"],
    "metric_list": [{"metric": "acc"}],
}
"""Its documents are of an odd number: one process has one more than the other."""


def test_two_processes_measure_what_one_does(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preloaded: Preloaded
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    prose = tmp_path / "prose"
    prose.mkdir()
    for part in range(3):
        text = " ".join(f"The {part} keeper of light {n} wrote a letter home." for n in range(100))
        (prose / f"{part}.txt").write_text(text)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"is {n} even", "a": n % 2}) + "\n" for n in range(5)))
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(rows)}}}
    (tmp_path / "even.yaml").write_text(json.dumps(task))
    options = f"--tasks needle-noise,text --text {prose} --lengths 700 --prompts 3 --against dense".split()
    options += ["--lm-eval", str(tmp_path / "even.yaml"), "--json"]

    out, scores = tmp_path / "one.json", tmp_path / "one.scores.jsonl"
    alone = CliRunner().invoke(app, ["eval", str(compressed), *options, "-o", str(out)])
    assert alone.exit_code == 0, alone.stderr
    expected: dict[str, Any] = json.loads(alone.stdout)

    begun, kept = tmp_path / "two.json", tmp_path / "two.scores.jsonl"
    lines = scores.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[::2]))  # every batch of several prompts lacks some
    csv, low = tmp_path / "rows.csv", ("--fail-under", "exact_match=0.99")
    ran = preloaded.run("eval", compressed, *options, "-o", begun, "--csv", csv, *low, ranks=2)
    assert ran.returncode != 0  # the plan of a random model is below the threshold
    found = json.loads(ran.stdout)
    assert len(found.pop("failures")) == 1
    assert ran.stderr.count("below the threshold") == 1
    assert json.loads(begun.read_text()) == found
    assert csv.read_text().count("\n") > 5
    assert {json.loads(line)["key"] for line in kept.read_text().splitlines()} == {
        json.loads(line)["key"] for line in lines
    }
    assert kept.read_text().count("\n") == len(lines)
    assert found.keys() == expected.keys()
    assert found["checkpoint"] == expected["checkpoint"]
    for name in ("results", "differences", "lm_eval"):
        assert len(found[name]) == len(expected[name])
        for ours, theirs in zip(found[name], expected[name], strict=True):
            assert {**ours, "value": 0, "ci95": 0} == {**theirs, "value": 0, "ci95": 0}
            assert ours["value"] == pytest.approx(theirs["value"], abs=1e-9), (name, ours)
