"""The log that a run resumes from: what survives a kill, what is named when it cannot be read, and what is never mistaken."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from moacompress.core.errors import ArtefactError
from moacompress.core.records import Entry, Records, named_numbers


def scores(path: Path | None, **options: Any) -> Records[Entry]:
    return Records(path, named_numbers, **options)


def line(key: str, **numbers: float) -> dict[str, Any]:
    return {"key": key, "numbers": numbers, "model": "plan"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "eval.scores.jsonl"


def test_values_come_back(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = scores(path)
    assert not path.parent.exists()
    records.append(line("a", nll=0.1 + 0.2, exact_match=1.0))
    records.append(line("b", nll=1e-300))
    records.append(line("a", nll=0.5))
    again = scores(path)
    for found in (records, again):
        assert (found.get("a"), found.get("b"), found.get("c")) == ({"nll": 0.5}, {"nll": 1e-300}, None)
    assert scores(path, resume=False).get("a") is None
    assert path.read_bytes().count(b"\n") == 3
    assert not caplog.text
    in_memory = scores(None)
    in_memory.append(line("a", x=1.0))
    assert in_memory.get("a") == {"x": 1.0}


@pytest.mark.parametrize("cut", [1, 9])
def test_a_torn_last_line_costs_only_itself_and_is_repaired(path: Path, cut: int) -> None:
    records = scores(path)
    for name in "ab":
        records.append(line(name, nll=1.0))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    resumed = scores(path)
    assert path.read_bytes() == whole[:-cut]  # reading changes nothing
    assert (resumed.get("a"), resumed.get("b")) == ({"nll": 1.0}, {"nll": 1.0} if cut == 1 else None)
    resumed.append(line("b", nll=1.0))
    assert path.read_bytes() == whole + (whole[len(whole) // 2 :] if cut == 1 else b"")


@pytest.mark.parametrize(
    "damage",
    [
        b"{", b"[1]", b"7", b"\xff\xfe", b'{"key":"a"}', b'{"key":"a","numbers":3}', b'{"key":"a","numbers":{"x":"y"}}',
        b'{"numbers":{"x":1}}', b'{"key":"a","numbers":{"x":NaN}}', b"[" * 100_000, b'{"key":"a","hit":true,"nll":1}',
    ],
)  # fmt: skip
def test_a_line_of_another_kind_is_named_and_passed_over(
    path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    path.write_bytes(b'\n{"key":"b","numbers":{"x":1}}\n' + damage + b'\n\n{"key":"c","numbers":{"x":2}}\n')
    found = scores(path)
    assert (found.get("a"), found.get("b"), found.get("c")) == (None, {"x": 1.0}, {"x": 2.0})
    assert f"{path}: cannot read line 3; what was there is computed again" in caplog.text
    path.write_bytes(b"diary\n" * 9)
    scores(path)
    assert "cannot read line 1, 2, 3, 4, 5 and 4 more" in caplog.text


def test_a_header_comes_first_and_tells_other_files(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    header = {"configuration": {"threads": 2}}
    records = scores(path, header=header)
    records.begin()
    records.append(line("a", x=1.0))
    found = scores(path, header={"configuration": {"threads": 1}})
    assert (found.header, found.get("a")) == (header, {"x": 1.0})
    found.append(line("b", x=2.0))
    assert path.read_text().count("configuration") == 1
    path.write_text("a diary\n")
    assert scores(path, header=header).header == {}
    path.write_text('{"configuration": {"thr')  # by a full disk
    begun = scores(path, header=header)
    assert begun.header is None
    begun.begin()
    begun.append(line("a", x=1.0))
    assert scores(path, header=header).get("a") == {"x": 1.0}
    assert not caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is needed")
def test_a_full_disk_is_one_error_and_costs_only_its_line(path: Path) -> None:
    records = scores(path)
    records.append(line("a", x=1.0))
    written = path.read_bytes()
    path.unlink()
    os.symlink("/dev/full", path)
    with pytest.raises(ArtefactError, match="cannot write .*No space left on device; what was written before is kept"):
        records.append(line("b", x=2.0))
    assert records.get("b") is None
    path.unlink()
    path.write_bytes(written + b'{"half')
    records.append(line("b", x=2.0))
    again = scores(path)
    assert (again.get("a"), again.get("b")) == ({"x": 1.0}, {"x": 2.0})
    with pytest.raises(ArtefactError, match="cannot read"):
        scores(path.parent)
