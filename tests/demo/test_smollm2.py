"""The demo on a tiny model: what it leaves, what it reuses, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from moacompress.core.artefact_names import of_compress, of_demo
from moacompress.core.errors import ArtefactError, DataError, ModelError, UsageError
from moacompress.core.lock_holders import own_folder
from moacompress.demo import smollm2
from moacompress.demo.smollm2 import run_demo
from moacompress.rules.plan import Plan

RECIPE = {
    "budget": "50%",
    "dtype": "float32",
    "calibration": {
        "sources": [{"generator": "needle"}],
        "lengths": [700],
        "samples": 2,
        "validation_samples": 2,
        "answer_tokens": 4,
    },
    "profile": {"draws": 1},
    "search": {"trials": 1},
    "evaluation": {"tasks": ["needle-noise"], "lengths": [700], "prompts": 2},
}
Demo = Callable[..., Any]


@pytest.fixture
def squad(tmp_path: Path) -> Path:
    path = tmp_path / "squad.json"
    path.write_text(
        json.dumps({"data": [{"title": f"{i}", "paragraphs": [{"context": f"Text. {i}"}]} for i in range(3)]})
    )
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Makes the demo one of seconds."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    monkeypatch.setattr(smollm2, "RECIPE", str(path))


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Leaves out all but the demo's own part; returns the folders that were to be filled."""
    folders: list[Path] = []
    monkeypatch.setattr(smollm2, "fill", lambda recipe, out, progress, **_: folders.append(out))
    return folders


@pytest.mark.heavy
def test_overwrite_starts_anew_and_all_that_is_left_is_listed(
    small: None, squad: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    summary = run_demo(out, tiny_folder, squad, dtype="bfloat16")
    assert json.loads((out / "summary.json").read_text()) == summary
    # bytes and checkpoint are of the dense model's dtype; profile and search compute in float32
    folders = [json.loads((out / name / "config.json").read_text())["dtype"] for name in ("dense", "model")]
    assert [*folders, summary["dtype"]] == ["bfloat16"] * 3
    plan = Plan.load(out / "plan.json")
    assert summary["kv_bytes"]["dense"] == plan.in_dtype("float32").model.dense_kv_bytes(700) // 2
    assert summary["kv_bytes"]["measured"] <= summary["kv_bytes"]["dense"] // 2
    listed = [*of_compress(out), *of_demo(out)]
    for path in out.rglob("*"):
        inside = path.is_relative_to(out / "profile") and path.is_dir()
        assert inside or any(path.is_relative_to(one) for one in listed), path
    assert all(path.exists() for path in of_demo(out))
    (out / "text" / "article-999.txt").write_text("of before")
    with ExitStack() as held:  # an open file keeps its inode from being given to another
        files = [path for path in out.rglob("*") if path.is_file()]
        inodes = {os.fstat(held.enter_context(path.open()).fileno()).st_ino for path in files}
        (out / "notes.txt").write_text("mine")
        run_demo(out, tiny_folder, squad, overwrite=True)
        assert not inodes & {path.stat().st_ino for path in out.rglob("*") if path.is_file()}
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "text" / "article-999.txt").exists()


def test_the_same_demo_goes_on_and_another_is_refused(
    filled: list[Path], squad: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out, copy = tmp_path / "out", tmp_path / "copy"
    run_demo(out, tiny_folder, squad)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    shutil.copytree(tiny_folder, copy)
    run_demo(out, copy, squad)  # the same model elsewhere
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    (copy / "LICENSE").write_text("another")
    with pytest.raises(ArtefactError, match="out holds another run .*; choose another folder or pass --overwrite"):
        run_demo(out, copy, squad)
    with pytest.raises(ArtefactError, match="holds another run"):
        run_demo(out, tiny_folder, squad, dtype="bfloat16")
    run_demo(out, copy, squad, overwrite=True)
    assert (out / "dense" / "LICENSE").read_text() == "another"
    squad.write_text(squad.read_text().replace("Text.", "Other text."))
    with pytest.raises(ArtefactError, match="holds another run"):
        run_demo(out, copy, squad)
    assert len(filled) == 3


def test_a_demo_that_could_not_begin_blocks_nothing(
    filled: list[Path], squad: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out, broken = tmp_path / "out", tmp_path / "broken"
    for wrong in ({"dtype": "int7"}, {"seed": -1}, {"device": 3}):
        with pytest.raises(UsageError):
            run_demo(out, tiny_folder, squad, **wrong)
        assert not out.exists()
    shutil.copytree(tiny_folder, broken)
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="the tokenizer in .*broken cannot be loaded"):
        run_demo(out, broken, squad)
    run_demo(out, tiny_folder, squad)
    assert filled == [out]


def test_overwrite_never_costs_what_no_demo_left_or_what_is_read(
    filled: list[Path], squad: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "text").mkdir(parents=True)
    for overwrite in (False, True):
        with pytest.raises(ArtefactError, match="choose another folder"):
            run_demo(out, tiny_folder, squad, overwrite=overwrite)
    assert (out / "text").exists()
    whole = tmp_path / "whole"
    run_demo(whole, tiny_folder, squad)
    with pytest.raises(ArtefactError, match="dense would be removed with .*dense; choose another folder"):
        run_demo(whole, whole / "dense", squad, overwrite=True)
    assert (whole / "dense" / "config.json").exists()
    with pytest.raises(DataError, match="cannot read .*none.json"):
        run_demo(tmp_path / "new", tiny_folder, tmp_path / "none.json")
    assert len(filled) == 1


def test_a_second_demo_in_the_same_folder_is_refused(squad: Path, tiny_folder: Path, tmp_path: Path) -> None:
    with own_folder(tmp_path / "out"), pytest.raises(ArtefactError, match="out is in use"):
        run_demo(tmp_path / "out", tiny_folder, squad)
    assert list((tmp_path / "out").iterdir()) == []
