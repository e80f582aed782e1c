"""Files on disk: whole or not at all, and messages a person can act on."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from moacompress.core import files
from moacompress.core.errors import ArtefactError
from moacompress.core.files import (
    canonical_json,
    fingerprint,
    finite_json,
    new_folder,
    read_json,
    write_bytes,
    write_json,
    write_text,
)


def test_equal_values_have_equal_fingerprints() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert canonical_json({"b": 1, "a": "ä"}) == '{"a":"ä","b":1}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(math.nan)


def test_json_round_trip_and_non_finite_numbers(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    write_json(path, {"a": (1, 2.5), "b": math.inf, 3: "ä"})
    assert read_json(path, "thing") == {"a": [1, 2.5], "b": None, "3": "ä"}
    assert finite_json((math.nan, 1)) == [None, 1]


def test_files_are_replaced_whole_and_nothing_is_left_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_text(path, "old")
    assert os.stat(path).st_mode & 0o777 == 0o666 & ~files._umask()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(ArtefactError, match="cannot write .*: No space left on device; nothing was changed"):
        write_bytes(path, b"new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="cannot write"):
        write_text(tmp_path / "file" / "x", "")
    with pytest.raises(ArtefactError, match="cannot write"), new_folder(tmp_path / "file" / "x"):
        pass


@pytest.mark.parametrize(
    "content", [b"{", b"\xff", b"[" * 100_000, b"9" * 5000], ids=["half", "not-utf8", "deep", "huge-number"]
)
def test_damaged_json(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match="thing .*x.json is not valid JSON"):
        read_json(path, "thing")


def test_json_of_bounded_size(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[1, 2, 3]")
    with pytest.raises(ArtefactError, match="has 9 bytes; at most 8 are read"):
        read_json(path, "thing", 8)
    with pytest.raises(ArtefactError, match="cannot read thing"):
        read_json(tmp_path / "none", "thing")


def test_a_folder_comes_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "out") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "x").read_text() == "1"
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_inside_leaves_nothing(overwrite: bool, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if overwrite:
        target.mkdir()
        (target / "old").write_text("old")

    def fail() -> None:
        with new_folder(target, overwrite=overwrite) as folder:
            (folder / "x").write_text("1")
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert [file.name for file in tmp_path.rglob("*")] == (["out", "old"] if overwrite else [])


def test_an_existing_folder_is_refused_before_the_block_runs(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtefactError, match="exists already; choose another folder or pass --overwrite"):
        new_folder(tmp_path / "out").__enter__()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with new_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert [file.name for file in target.iterdir()] == ["new"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".out.abc.partial").mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
