"""`--dry-run` of `bench` and `export`: everything is checked, what would be done is said, and nothing is written."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from moacompress.cli import app
from moacompress.estimate.stopwatch import Stopwatch
from tests.cli.commands import answer, invoke, problem
from tests.conftest import tiny_model
from tests.plan_kinds import gated_plan


def dry(*arguments: str | Path) -> str:
    done = invoke(*arguments, "--dry-run")
    assert done.exit_code == 0, done.output
    return " ".join(done.stdout.split())


def numbers(*arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = answer(*arguments, "--dry-run")
    return found


def test_bench(compressed: Path, tmp_path: Path) -> None:
    small = ("bench", compressed, "--lengths", "96,160", "--batch", "1,2", "--repeats", "2", "-o", tmp_path / "b.json")
    assert "for 4 cells of 4 sides, and about " in dry(*small)
    sides = ("--sides", "plan,dense", "--no-peak")
    less, more = numbers(*small, *sides), numbers(*small, *sides, "--repeats", "200", "--prefill-repeats", "100")
    assert (less["cells"], less["sides"]) == (4, 2)
    assert more["seconds"] > 5 * less["seconds"] > 0
    assert less["peak_bytes"] == more["peak_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_export(compressed: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moacompress.exporter.exporting.verify_fresh", lambda *arguments, **options: None)
    out, plan = tmp_path / "model", tmp_path / "plan.json"
    shutil.copyfile(compressed / "model" / "plan.json", plan)
    command = ("export", tiny_folder, plan, "-o", out)
    assert f"It would write {out}, about " in dry(*command)
    opened = Stopwatch.once
    with monkeypatch.context() as slow:  # most of an export of a .gguf file is what reading it takes
        slow.setattr(Stopwatch, "once", lambda watch, work: (100.0, opened(watch, work)[1]))
        assert numbers(*command)["seconds"] > 100
    assert numbers(*command)["seconds"] < 100
    weight_bytes = numbers(*command)["weight_bytes"]
    assert not out.exists()
    assert invoke(*command).exit_code == 0
    assert dry(*command) == f"{out} is an export of this plan already; it would be left as it is."
    header = 2**14
    assert weight_bytes <= (out / "model.safetensors").stat().st_size <= weight_bytes + header
    written = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert f"It would replace the checkpoint in {out}" in dry(*command, "--overwrite")
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == written
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    wrong = ("export", tiny_folder, plan, "-o", tmp_path / "mine")
    assert "exists already and is not" in problem(*wrong, "--dry-run")
    assert "is not a folder" in problem(*command[:-1], plan / "model", "--dry-run")


def test_what_export_refuses(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Gates that are not at hand; and a tied weight is counted once."""
    model = tiny_model(tie_word_embeddings=True)
    for part in (model, tiny_tokenizer):
        part.save_pretrained(tmp_path / "dense")
    gated_plan(model, 1).save(tmp_path / "plan.json")
    command = ("export", tmp_path / "dense", tmp_path / "plan.json", "-o", tmp_path / "model")
    size = (tmp_path / "dense" / "model.safetensors").stat().st_size
    assert 0 < size - numbers(*command)["weight_bytes"] < 2**14
    (tmp_path / "plan.gates.safetensors").unlink()
    assert "are not at hand" in problem(*command, "--dry-run")


@pytest.mark.parametrize("options", [["--dry-run"], []])
def test_threads_that_wait_sleep_where_seconds_are_estimated(
    options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenMP reads it when torch is loaded; time that threads spin on a busy machine would be counted as work."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # as it was, after the test
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.delitem(sys.modules, "torch")
    typer.main.get_command(app).commands["eval"].make_context("eval", ["nothing", *options])  # type: ignore[attr-defined]
    assert os.environ.get("OMP_WAIT_POLICY") == ("passive" if options else None)
