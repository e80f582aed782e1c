"""Profiles that were begun when prompts said something else: finished with their own samples, or refused and left alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from moacompress.calibration.profile.profiler import profile
from moacompress.calibration.profile.store import Profile
from moacompress.calibration.profile.wording import calibration_wording
from moacompress.core.artefact_names import CALIBRATION_FILE, INFLUENCE_FILE, MANIFEST_FILE, VALIDATION_FILE
from moacompress.core.errors import ArtefactError
from moacompress.models.source import SourceModel
from moacompress.prompts import sentences
from moacompress.recipe import Recipe

if TYPE_CHECKING:
    from tests.calibration.conftest import Sources

SIZE = {"lengths": [700], "samples": 2, "validation_samples": 1, "longer_samples": 0, "answer_tokens": 8}


def recipe_of(source: dict[str, Any]) -> Recipe:
    return Recipe.from_dict({"calibration": {"sources": [source], **SIZE}, "profile": {"draws": 1}})


RECIPE = recipe_of({"generator": "needle"})


@pytest.fixture(scope="module")
def made(load: Sources, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Returns a finished profile; do not write into it."""
    return profile(load(), tmp_path_factory.mktemp("made") / "p", RECIPE)


@pytest.fixture
def reword(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Returns what makes prompts say something else."""
    said = replace(sentences.NEEDLES, needle="Keep in mind that {key} has the {kind} {value}.")
    return lambda: monkeypatch.setattr(sentences, "NEEDLES", said)


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".owner", ".lock")
    }


def stopped(finished: Path, folder: Path, *lost: str, **fields: str) -> Path:
    """Copies a finished profile as one that was stopped before it had some files, or wrote some fields."""
    shutil.copytree(finished, folder)
    for name in (INFLUENCE_FILE, *lost):
        (folder / name).unlink()
    data = json.loads((folder / MANIFEST_FILE).read_text("utf-8"))
    (folder / MANIFEST_FILE).write_text(json.dumps({**data, "complete": False, "digest": "", **fields}), "utf-8")
    return folder


def wording(folder: Path) -> str:
    return str(json.loads((folder / MANIFEST_FILE).read_text("utf-8"))["wording"])


def test_wording_is_part_of_the_fingerprint(
    source: SourceModel, made: Profile, tmp_path: Path, reword: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    before = calibration_wording()
    assert wording(made.path) == before
    whole, out = tmp_path / "whole", stopped(made.path, tmp_path / "stopped")
    shutil.copytree(made.path, whole)
    begun = stopped(made.path, tmp_path / "begun", CALIBRATION_FILE, VALIDATION_FILE, fingerprint="")
    shutil.rmtree(begun / "samples")
    reword()
    assert calibration_wording() != before
    for folder in (whole, out):  # their samples are there
        assert profile(source, folder, RECIPE).fingerprint == made.fingerprint
        assert "are worded in another way than this moacompress does it; its samples are kept" in caplog.text
        caplog.clear()
    assert profile(source, begun, RECIPE).fingerprint != made.fingerprint  # nothing but the request was
    assert wording(begun) == calibration_wording()


@pytest.mark.parametrize("lost", [CALIBRATION_FILE, VALIDATION_FILE])
def test_samples_of_two_wordings_are_not_mixed(
    source: SourceModel, made: Profile, tmp_path: Path, reword: Callable[[], None], lost: str
) -> None:
    out = stopped(made.path, tmp_path / "p", lost)
    reword()
    before = content(out)
    with pytest.raises(ArtefactError, match=r"not finished and whose prompts are worded in another way.*--overwrite$"):
        profile(source, out, RECIPE)
    assert content(out) == before
    assert profile(source, out, RECIPE, overwrite=True).fingerprint != made.fingerprint


def test_rows_of_a_file_say_what_they_say(
    source: SourceModel, tmp_path: Path, reword: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    rows = tmp_path / "rows.jsonl"
    text = [{"prompt": f"{index} " + "word " * 130, "answer": "no"} for index in range(12)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in text))
    given = recipe_of({"path": str(rows)})
    whole = profile(source, tmp_path / "whole", given)
    out = stopped(whole.path, tmp_path / "p", VALIDATION_FILE)
    reword()
    assert profile(source, out, given).fingerprint == whole.fingerprint
    assert caplog.text == ""
