"""Files on disk: whole or not at all, and messages a person can act on."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moacompress.core import files
from moacompress.core.errors import ArtefactError
from moacompress.core.files import (
    canonical_json,
    fingerprint,
    new_folder,
    read_json,
    remove,
    sweep_files,
    write_json,
    write_text,
    write_texts,
)
from moacompress.core.lock_holders import own_file
from moacompress.core.printable import printable
from moacompress.core.records import Records, named_numbers


def below(folder: Path) -> list[str]:
    """Returns the names of all that is in a folder, in its folders too."""
    return [path.name for path in folder.rglob("*")]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Returns a folder with a file in it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    return tmp_path / "out"


def test_equal_values_have_equal_fingerprints() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert canonical_json({"b": 1, "a": "ä"}) == '{"a":"ä","b":1}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(math.nan)


def test_json_round_trip_and_non_finite_numbers(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    half = json.loads('"a\\ud800b"')  # of a character, as JSON of others may hold; no terminal can be given it either
    write_json(path, {"a": (1, 2.5, math.nan), "b": math.inf, 3: half})
    assert read_json(path, "thing") == {"a": [1, 2.5, None], "b": None, "3": half}
    assert printable(half) == "a\\ud800b"
    assert printable("plan\u202ejson\u2066") == "plan\\u202ejson\\u2066"  # would be shown in another order
    with pytest.raises(ArtefactError, match="has .* bytes; at most 8 are read"):
        read_json(path, "thing", 8)
    with pytest.raises(ArtefactError, match="cannot read thing"):
        read_json(tmp_path / "none", "thing")


@pytest.mark.parametrize("mask", [0o077, 0o002])
def test_files_have_the_mode_that_the_umask_leaves(mask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of libraries in a new folder too, which may be for their owner alone; nobody else's files are made meanwhile."""
    before, out = os.umask(mask), tmp_path / "out"
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", lambda mask: pytest.fail("the umask was set, for other threads too"))
            write_text(tmp_path / "text", "x")
            with new_folder(out) as folder:
                (folder / "in").mkdir()
                (folder / "in" / "private").touch(0o600)
                (folder / "link").symlink_to(tmp_path / "text")
    finally:
        os.umask(before)
    for path in (tmp_path / "text", out / "in" / "private"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    assert out.stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="this system has no file without an end")
def test_links_in_a_folder_of_others_lead_nowhere(tmp_path: Path) -> None:
    """Not to a device that has no end, nor to a file of one's own, whose last line would be cut off."""
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(ArtefactError, match="config .* has no end; at most 1,000 bytes are read"):
        read_json(tmp_path / "config.json", "config", 1000)
    (tmp_path / "mine").write_text("half a line")
    (tmp_path / "eval.scores.jsonl").symlink_to(tmp_path / "mine")
    for resume in (False, True):
        with pytest.raises(ArtefactError, match="is a link, which is not followed"):
            Records(tmp_path / "eval.scores.jsonl", named_numbers, resume=resume)
    write_text(tmp_path / "eval.scores.jsonl", "ours")
    assert (tmp_path / "mine").read_text() == "half a line"


def test_files_of_one_another_are_whole_before_one_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_texts({first: "1", second: "1"})
    assert [path.read_text() for path in (first, second)] == ["1", "1"]
    write, move = files._write_aside, os.replace

    def full_disk(path: Path, data: bytes) -> Path:
        if path == second:
            raise OSError(28, "No space left on device")
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_write_aside", full_disk)
        with pytest.raises(ArtefactError, match="cannot write .*second: No space left on device; nothing was changed"):
            write_texts({first: "2", second: "2"})
    assert [path.read_text() for path in (first, second)] == ["1", "1"]

    def refuse(source: Path, target: Path) -> None:
        if target == second:
            raise OSError(1, "Operation not permitted")
        move(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ArtefactError, match="cannot write .*second: Operation not permitted; .*first was written"):
        write_texts({first: "2", second: "2"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


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


@pytest.mark.parametrize("before", ["nothing", "empty", "full"])
def test_a_folder_comes_whole_in_the_place_of_what_was_there(before: str, tmp_path: Path) -> None:
    target = tmp_path / "a" / "out"
    if before != "nothing":
        target.mkdir(parents=True)
    if before == "full":
        (target / "old").write_text("old")
    with new_folder(target, overwrite=before == "full") as folder:
        (folder / "x").write_text("1")
        assert not (target / "x").exists()
    assert (target / "x").read_text() == "1"
    assert below(tmp_path) == ["a", "out", "x"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_inside_leaves_nothing(overwrite: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    left = ["out", "old"] if overwrite and request.getfixturevalue("old") else []

    def fail() -> None:
        with new_folder(tmp_path / "out", overwrite=overwrite) as folder:
            (folder / "x").write_text("1")
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert below(tmp_path) == left


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["disk", "interrupt"])
def test_an_overwrite_that_fails_half_way_puts_the_old_folder_back(
    error: BaseException, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, moved = os.replace, list[Path]()

    def fail_second(source: Path, to: Path) -> None:
        moved.append(source)
        if len(moved) == 2:
            raise error
        replace(source, to)

    def overwrite() -> None:
        with new_folder(old, overwrite=True) as folder:
            monkeypatch.setattr(os, "replace", fail_second)
            (folder / "new").write_text("new")

    with pytest.raises((ArtefactError, KeyboardInterrupt), match="cannot write .*: Input/output error|^$"):
        overwrite()
    assert below(old.parent) == ["out", "old"]


KILLED = """
import os, sys
from pathlib import Path
from moacompress.core import files
left, target = int(sys.argv[1]), Path(sys.argv[2])
names = ("replace", "rmdir", "unlink", "rename")
for name in names:
    def counted(*args, call=getattr(os, name), **rest):
        global left
        if armed and left == 0:
            os._exit(9)
        left -= armed
        return call(*args, **rest)
    setattr(os, name, counted)
armed = False
with files.new_folder(target, overwrite=True) as folder:
    (folder / "weights").write_text("new")
    (folder / "config").write_text("new")
    armed = True
os._exit(0)
"""


def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    found = set()
    for stop in range(40):
        target = tmp_path / str(stop) / "out"
        target.mkdir(parents=True)
        for name in ("weights", "config"):
            (target / name).write_text("old")
        command = [sys.executable, "-c", KILLED, str(stop), str(target)]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode in (0, 9), ended.stderr
        files.sweep_folders(target)
        whole = {(target / name).read_text() for name in ("weights", "config")}
        assert len(whole) == 1
        assert [path.name for path in target.parent.iterdir()] == ["out"]
        found |= whole
        if ended.returncode == 0:
            break
    assert stop > 2
    assert found == {"old", "new"}


def test_what_a_live_process_is_replacing_is_left_to_it(tmp_path: Path) -> None:
    """Another one that looks between the two moves neither restores the old folder nor removes it."""
    target, old = tmp_path / "out", tmp_path / ".out.01234567.replaced"
    old.mkdir()
    with own_file(old):
        files.sweep_folders(target)
        assert old.exists()
        assert not target.exists()
    files.sweep_folders(target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    """Be it before the block runs, or made meanwhile."""

    def make() -> None:
        with new_folder(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("1")

    for _ in range(2):
        with pytest.raises(ArtefactError, match="exists already; choose another folder or pass --overwrite"):
            make()
        assert below(tmp_path) == ["out", "theirs"]


MAKE = """
import sys
from pathlib import Path
from moacompress.core.files import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "theirs").write_text("1")
    print("inside", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("killed", [False, True])
def test_what_another_process_is_making_is_cleared_away_once_it_is_dead(killed: bool, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAKE, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "inside\n"
        if killed:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert len(list(tmp_path.iterdir())) == 2  # the folder and its lock holder
        with new_folder(tmp_path / "out") as folder:
            (folder / "ours").write_text("2")
        if not killed:
            shutil.rmtree(tmp_path / "out")
            process.communicate("go on\n")
    assert below(tmp_path) == ["out", "ours" if killed else "theirs"]


@pytest.mark.parametrize("name", ["out", "a[1]", "*", "?b", "a.b"])
def test_a_name_is_no_pattern(name: str, tmp_path: Path) -> None:
    others = [".other.89abcdef.partial", ".out.b.89abcdef.partial", ".xb.89abcdef.partial", ".a1.89abcdef.partial"]
    for left in (*others, f".{name}.89abcdef.partial"):
        (tmp_path / left).mkdir()
    (tmp_path / f"..{name}.01234567.partial.owner").write_text('{"host": "half')
    (tmp_path / f".{name}.notes.partial").mkdir()  # somebody's own: no name that is made here
    with new_folder(tmp_path / name):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*others, f".{name}.notes.partial", name}


def test_files_half_written_are_cleared_away_by_their_holder(tmp_path: Path) -> None:
    moved = "a[1].json6558851e-af54-4bde-8577-ec4df6ebac30.rename"  # as Optuna moves its locks
    for name in (".a[1].json.89abcdef.tmp", moved, ".a1.json.89abcdef.tmp", ".a[1].json.notes.tmp", "a[1].json"):
        (tmp_path / name).write_text("")
    sweep_files(tmp_path / "a[1].json")
    sweep_files(tmp_path / "none" / "a.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".a1.json.89abcdef.tmp",
        ".a[1].json.notes.tmp",
        "a[1].json",
    ]


def test_only_what_is_named_is_removed(tmp_path: Path) -> None:
    for name in ("model/a", "model/deep/b", "elsewhere/c", "mine"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    remove(tmp_path / name for name in ("model", "link", "none", "mine/below"))
    assert {path.name for path in tmp_path.rglob("*")} == {"elsewhere", "c", "mine"}


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "stdout").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("stdout", "pipe"):
        write_text(tmp_path / name, "text")
    assert os.read(reader, 99) == b"text"
    os.close(reader)
    assert (tmp_path / "stdout").is_char_device()
    assert (tmp_path / "pipe").is_fifo()


def test_a_folder_is_removed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "samples").mkdir()
    real = os.replace

    def slower(path: Any, to: Any) -> None:
        if Path(path).name == "samples":
            (tmp_path / "samples").rmdir()
        real(path, to)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", slower)
        remove([tmp_path / "samples"])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model").mkdir()
    with monkeypatch.context() as patched:  # killed while it goes, a folder is gone under its name
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove([tmp_path / "model"])
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    files.sweep_folders(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
