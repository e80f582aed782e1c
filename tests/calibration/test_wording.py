"""Profiles that were begun when prompts said something else: finished with their own samples, or refused and left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moacompress.calibration.profile.profiler import profile
from moacompress.calibration.profile.wording import calibration_wording
from moacompress.core.artefact_names import CALIBRATION_FILE, INFLUENCE_FILE, MANIFEST_FILE, VALIDATION_FILE
from moacompress.core.errors import ArtefactError
from moacompress.models.source import SourceModel
from moacompress.prompts import sentences
from moacompress.recipe import Recipe

SIZE = {"lengths": [700], "samples": 2, "validation_samples": 1, "longer_samples": 0, "answer_tokens": 8}
GENERATED = {"sources": [{"generator": "needle"}], **SIZE}


@pytest.fixture
def reword(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Returns what makes prompts say something else."""
    said = replace(sentences.NEEDLES, needle="Keep in mind that {key} has the {kind} {value}.")

    def change() -> None:
        monkeypatch.setattr(sentences, "NEEDLES", said)

    return change


def recipe(**calibration: Any) -> Recipe:
    return Recipe.from_dict({"calibration": {**GENERATED, **calibration}, "profile": {"draws": 1}})


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".owner", ".lock")
    }


def unfinished(folder: Path, *lost: str) -> None:
    """Makes a finished profile one that was stopped before it had some files."""
    for name in (INFLUENCE_FILE, *lost):
        (folder / name).unlink()
    data = json.loads((folder / MANIFEST_FILE).read_text("utf-8"))
    (folder / MANIFEST_FILE).write_text(json.dumps({**data, "complete": False, "digest": ""}), "utf-8")


def test_wording_is_part_of_the_fingerprint(
    source: SourceModel, tmp_path: Path, reword: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    out, given = tmp_path / "p", recipe()
    made = profile(source, out, given)
    before = calibration_wording()
    assert json.loads((out / MANIFEST_FILE).read_text("utf-8"))["wording"] == before
    reword()
    assert calibration_wording() != before
    assert profile(source, out, given).fingerprint == made.fingerprint
    assert "are worded in another way than this moacompress does it; its samples are kept" in caplog.text
    unfinished(out)  # but its samples are there
    assert profile(source, out, given).fingerprint == made.fingerprint
    assert profile(source, tmp_path / "other", given).fingerprint != made.fingerprint


@pytest.mark.parametrize("lost", [CALIBRATION_FILE, VALIDATION_FILE])
def test_samples_of_two_wordings_are_not_mixed(
    source: SourceModel, tmp_path: Path, reword: Callable[[], None], lost: str
) -> None:
    out, given = tmp_path / "p", recipe()
    made = profile(source, out, given)
    unfinished(out, lost)
    reword()
    before = content(out)
    with pytest.raises(
        ArtefactError, match=r"^[^\n]*not finished and whose prompts are worded in another way[^\n]*--overwrite$"
    ):
        profile(source, out, given)
    assert content(out) == before
    assert profile(source, out, given, overwrite=True).fingerprint != made.fingerprint


def test_rows_of_a_file_say_what_they_say(
    source: SourceModel, tmp_path: Path, reword: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    out, rows = tmp_path / "p", tmp_path / "rows.jsonl"
    text = [{"prompt": f"{index} " + "word " * 130, "answer": "no"} for index in range(12)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in text))
    given = recipe(sources=[{"path": str(rows)}])
    made = profile(source, out, given)
    unfinished(out, VALIDATION_FILE)
    reword()
    assert profile(source, out, given).fingerprint == made.fingerprint
    assert caplog.text == ""


def test_nothing_begun_is_begun_in_this_wording(
    source: SourceModel, tmp_path: Path, reword: Callable[[], None]
) -> None:
    out, given = tmp_path / "p", recipe()
    profile(source, out, given)
    data = json.loads((out / MANIFEST_FILE).read_text("utf-8"))
    for path in [*out.rglob("*.safetensors")]:
        path.unlink()
    (out / MANIFEST_FILE).write_text(json.dumps({**data, "complete": False, "digest": "", "fingerprint": ""}), "utf-8")
    reword()
    profile(source, out, given)
    assert json.loads((out / MANIFEST_FILE).read_text("utf-8"))["wording"] == calibration_wording()
