"""Rows of files of every kind, by `datasets` itself; a folder stands for a hub set, which it loads by the same call."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from moacompress.core import loaded_rows
from moacompress.core.errors import DataError
from moacompress.core.loaded_rows import LOADERS, file_rows, hub_rows, read_once

ROWS: list[dict[str, Any]] = [
    {"prompt": "2021-05-03", "answer": "007"},
    {"prompt": 'a,\n"b"\u2028', "answer": "NA"},
    {"prompt": "c", "answer": "3"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes rows in the form that the suffix says, a byte order mark before texts."""
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), "utf-8-sig")
    else:
        path.write_text("".join(f"{json.dumps(row)}\n\n" for row in rows), "utf-8-sig")
    return path


@pytest.mark.parametrize("suffix", [suffix for suffix in LOADERS if suffix != ".txt"])
def test_texts_are_as_they_are_written(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"rows [1]*{suffix}", ROWS)
    assert file_rows(LOADERS[suffix], path) == ROWS
    assert list(tmp_path.iterdir()) == [path]


def test_a_text_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("\ufeffone\r\n\n two\u2028three\n".encode())
    assert file_rows("text", path) == [{"text": "one\n\n two\u2028three\n"}]


def test_what_a_row_of_json_lacks_is_none(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "calls": [{"id": 1}]}]
    rows: list[dict[str, Any]] = [{"messages": turns[:1]}, {"messages": turns, "source": {"file": "x"}}]
    first, second = file_rows("json", write(tmp_path / "rows.jsonl", rows))
    assert (first["source"], second["source"]) == (None, {"file": "x"})
    assert [turn["content"] for turn in second["messages"]] == ["a", None]


def test_nothing_is_said_on_the_screen(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text("3")
    with pytest.raises(DataError, match=r"cannot read .*bad.json: "):
        file_rows("json", tmp_path / "bad.json")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("large", "count"), [(1 << 30, 3), (1, 2)])
def test_of_a_large_set_the_first_rows_are_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int, count: int
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loaded_rows, "LARGE_BYTES", large)
    monkeypatch.setattr(loaded_rows, "STREAMED_ROWS", 2)
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    write(folder / "train.jsonl", ROWS)
    splits = "  splits:\n  - {name: train, num_bytes: 90, num_examples: 3}\n"
    (folder / "README.md").write_text(f"---\ndataset_info:\n{splits}---\n")
    found = hub_rows("org/name", None, "train")
    assert list(found) == ROWS[:count]
    assert isinstance(found, list) == (count == 2)
    with pytest.raises(DataError, match=r"cannot load hub set org/name: ValueError: .*test"):
        hub_rows("org/name", None, "test")


def test_rows_are_read_again_where_a_file_was_written(tmp_path: Path) -> None:
    """Of a file and of a folder: as long as nothing changes they are read once, and what fails is not kept."""
    (tmp_path / "a.txt").write_text("a")
    read: list[Path] = []

    @read_once
    def texts(path: Path) -> list[str]:
        read.append(path)
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        return [file.read_text() for file in files]

    for path, files in ((tmp_path / "a.txt", 1), (tmp_path, 2)):
        before = texts(path)
        assert texts(path) is before
        (tmp_path / "a.txt").write_text(f"{before[0]} and more")
        (tmp_path / "b.txt").write_text("b")
        assert texts(path) == texts(path) == ["a and more" if files == 1 else "a and more and more", "b"][:files]
    (tmp_path / "b.txt").unlink()
    assert texts(tmp_path) == ["a and more and more"]
    assert read == [tmp_path / "a.txt"] * 2 + [tmp_path] * 3
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            texts(tmp_path / "b.txt")
    assert len(read) == 7
