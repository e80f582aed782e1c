"""Who works on a file or folder: one live process at a time, and no dead one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moacompress.core import lock_holders
from moacompress.core.artefact_names import holder_of_file, holder_of_folder
from moacompress.core.errors import ArtefactError
from moacompress.core.lock_holders import LockHolder, own_file, own_folder, readable_age, release_dead

HOLD = """
import signal, sys
from pathlib import Path
from moacompress.core.lock_holders import own_file
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
with own_file(Path(sys.argv[1])):
    print("held", flush=True)
    if sys.stdin.readline() == "fail\\n":
        raise ValueError
"""
TRY = """
import sys
from pathlib import Path
from moacompress.core.errors import ArtefactError
from moacompress.core.lock_holders import own_file
print("ready", flush=True)
sys.stdin.readline()
try:
    with own_file(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.readline()
except ArtefactError:
    print("refused", flush=True)
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "plan.json"


@pytest.fixture
def start(target: Path) -> Iterator[Start]:
    """Starts a script on `target` in a process of its own."""
    started = []

    def run(script: str, says: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(target)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        assert heard(process) == says
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def is_free(path: Path) -> bool:
    """Whether this process can own it; then it does for a moment."""
    try:
        with own_file(path):
            return True
    except ArtefactError:
        return False


def leave(path: Path, holder: LockHolder | str) -> None:
    """Leaves the trace of a lock holder."""
    holder_of_file(path).write_text(holder if isinstance(holder, str) else json.dumps(holder.to_dict()))


@pytest.mark.parametrize("end", ["normal", "error", "Ctrl-C", "killed"])
def test_it_is_free_after_any_end(end: str, target: Path, start: Start) -> None:
    process = start(HOLD, "held")
    with pytest.raises(ArtefactError) as error, own_file(target):
        pass
    said = f"{target} is in use: process {process.pid} on {os.uname().nodename} has been at work on it"
    assert str(error.value).startswith(said)
    assert str(error.value).endswith("; wait until it is done, stop it, or choose another file")
    if end in ("Ctrl-C", "killed"):
        process.send_signal(signal.SIGINT if end == "Ctrl-C" else signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but nobody asked how it ended
    else:
        tell(process, "fail" if end == "error" else "go on")
        assert (process.wait() == 0) == (end == "normal")
    assert holder_of_file(target).exists() == (end == "killed")
    assert is_free(target)
    assert not holder_of_file(target).exists()


def test_of_many_that_come_at_once_one_is_the_holder(target: Path, start: Start) -> None:
    process = start(HOLD, "held")
    process.kill()
    process.wait()
    many = [start(TRY, "ready") for _ in range(4)]
    for process in many:
        tell(process, "now")
    assert sorted(heard(process) for process in many) == ["held", *["refused"] * 3]


def test_a_second_one_in_this_process_is_refused(target: Path) -> None:
    found: list[bool] = []
    with own_file(target):
        thread = threading.Thread(target=lambda: found.append(is_free(target)))
        thread.start()
        thread.join()
        assert not is_free(target)
        with own_file(target.with_name("other.json")):
            pass
    assert found == [False]
    assert is_free(target)


def test_what_this_process_no_longer_holds_is_free(target: Path) -> None:
    """An interrupt in the wrong place leaves a trace of a process that lives on."""
    leave(target, LockHolder.new())
    assert is_free(target)


def test_the_fork_of_a_holder_leaves_it_alone(target: Path) -> None:
    with contextlib.ExitStack() as owned:
        owned.enter_context(own_file(target))
        child = os.fork()
        if child == 0:
            refused = not is_free(target)
            owned.close()
            os._exit(0 if refused and not is_free(target) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert holder_of_file(target).exists()
        assert not is_free(target)
    assert is_free(target)


ALIVE = LockHolder.new()
"""Looks like a lock holder that lives, but for what a test changes."""


@pytest.fixture
def parent() -> LockHolder:
    """A live process that is not this one."""
    return replace(ALIVE, pid=os.getppid(), started=lock_holders._started(os.getppid()) or "")


@pytest.mark.parametrize(
    "change", [{}, {"host": "container", "pid_namespace": "pid:[1]"}], ids=["here", "another container"]
)
def test_the_trace_of_what_has_lost_its_lock_does_not_count(
    change: dict[str, Any], parent: LockHolder, target: Path
) -> None:
    leave(target, replace(parent, **change))
    assert is_free(target)


@pytest.mark.parametrize("change", [{"started": "1"}, {"pid": 2**22 + 1}, {"pid": 2**80}, {"pid": os.getpid()}])
def test_without_a_lock_a_holder_is_alive_if_its_process_is(change: dict[str, Any], parent: LockHolder) -> None:
    """As of a study in a database; a dead process is known at once, and one that runs need not be heard of."""

    def silent() -> float:
        raise AssertionError

    assert parent.is_alive(silent)
    assert not replace(parent, **change).is_alive(silent)
    for elsewhere in ({"boot": "another"}, {"pid_namespace": "pid:[1]"}, {"started": ""}):
        holder = replace(parent, **change | elsewhere)
        assert holder.is_alive(lambda: 10.0)
        assert not holder.is_alive(lambda: lock_holders.SILENT_SECONDS + 1)


@pytest.mark.parametrize(
    "trace",
    ["", "{", '{"pid": 1}', "[1]", "\0" * 99, "[" * 4000, {"pid": -1}, {"pid": 0}, {"pid": "1"}, {"begun": "now"}],
    ids=["empty", "cut", "half", "list", "zeros", "deep", "negative", "group", "text", "word"],
)
def test_a_trace_that_cannot_be_read_does_not(trace: Any, target: Path) -> None:
    leave(target, json.dumps({**ALIVE.to_dict(), **trace}) if isinstance(trace, dict) else trace)
    assert is_free(target)


@pytest.mark.parametrize("change", [{"host": "elsewhere", "boot": "another"}, {"boot": "another"}, {"boot": ""}])
def test_where_nothing_is_known_a_holder_is_heard_of(change: dict[str, Any], parent: LockHolder, target: Path) -> None:
    """Another machine, also one of the same name, or a system that does not say which boot it is in."""
    now = time.time()
    leave(target, replace(parent, **change, begun=now - 7300))
    with pytest.raises(ArtefactError, match="has been at work on it for 2 hours; .* try again in 5 minutes if"):
        own_file(target).__enter__()
    for when in (now - lock_holders.SILENT_SECONDS - 60, now + lock_holders.SILENT_SECONDS + 60):
        os.utime(holder_of_file(target), (when, when))
        leave_alone = holder_of_file(target).read_bytes()
        assert is_free(target)
        holder_of_file(target).write_bytes(leave_alone)


def test_a_holder_is_heard_of_as_long_as_it_works(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beats = threading.Semaphore(0)
    utime = os.utime

    def heartbeat(*arguments: Any) -> None:
        utime(*arguments)
        beats.release()

    monkeypatch.setattr(lock_holders, "BEAT_SECONDS", 0.001)
    with own_file(target):
        utime(holder_of_file(target), (0, 0))
        monkeypatch.setattr(os, "utime", heartbeat)
        assert beats.acquire(timeout=60)
        assert beats.acquire(timeout=60)
        assert holder_of_file(target).stat().st_mtime > 0
    assert [thread.name for thread in threading.enumerate() if thread.name == "moacompress-owner"] == []


def test_a_holder_leaves_the_file_of_its_successor_alone(parent: LockHolder, target: Path) -> None:
    """It slept for long, and another machine took over."""
    with own_file(target):
        leave(target, parent)
        os.utime(holder_of_file(target), (0, 0))
        lock_holders._touch(holder_of_file(target), ALIVE)
        assert holder_of_file(target).stat().st_mtime == 0
    assert holder_of_file(target).exists()


def test_without_locks_on_the_file_system(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with own_file(target):
        assert not is_free(target)
    assert is_free(target)


def test_a_folder_may_go_while_it_is_owned(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    with own_folder(folder):
        assert holder_of_folder(folder).is_file()
        with pytest.raises(ArtefactError, match="is in use: .* or choose another folder"), own_folder(folder):
            pass
        shutil.rmtree(folder)
        with own_folder(folder):  # made afresh by somebody else
            pass
    assert list(folder.iterdir()) == []
    with own_folder(folder):
        folder.rename(tmp_path / "moved")
    assert not folder.exists()
    assert is_free(tmp_path / "moved" / "plan.json")


def test_a_path_from_here_is_the_same_after_a_change_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path)
    with own_file(Path("plan.json")):
        monkeypatch.chdir(tmp_path / "below")
    assert not holder_of_file(tmp_path / "plan.json").exists()


def test_a_place_that_cannot_be_written_needs_no_holder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing")):
        with own_folder(place):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_one_error_and_leaves_nothing(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dumps", full)
    with (
        pytest.raises(ArtefactError, match="cannot write .*plan.json.owner: No space left on device"),
        own_file(target),
    ):
        pass
    assert list(target.parent.iterdir()) == []


def test_only_a_dead_holder_is_released(parent: LockHolder, target: Path) -> None:
    file = holder_of_file(target)
    assert release_dead(file)
    with own_file(target):
        assert not release_dead(file)
        assert file.exists()
    leave(target, replace(parent, boot="another"))
    assert not release_dead(file)
    leave(target, parent)
    assert release_dead(file)
    assert not file.exists()


def test_ages_as_a_person_says_them() -> None:
    assert [readable_age(each) for each in (-3, 1, 59.9, 60)] == ["0 seconds", "1 second", "59 seconds", "1 minute"]
