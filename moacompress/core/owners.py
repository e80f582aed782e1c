"""Who works on a file or a folder: one process at a time. What a dead one left is taken over without a question.

A process that works on something writes an owner file in the folder, or beside the file, and removes it when it is done.
Machines are told apart by their names. On one machine an owner is alive if its process is: the one that began when the file
says, as the same process id is given again, and in the same boot. Of another machine, or of another container, nothing is
known but when it was last heard of: an owner touches its file as long as it works. The owner of what is not in a file, such as
a study in a database, is kept there (`Owner.to_dict`).

The file is locked (flock) only while somebody reads and writes it, so that of two who come at once one is the owner. Where a
file system has no such locks, both may be, if they come within the same millisecond.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moacompress.core.artefact_names import owner_of_file, owner_of_folder
from moacompress.core.errors import ArtefactError

BEAT_SECONDS = 30.0
"""An owner is heard of this often."""
SILENT_SECONDS = 300.0
"""An owner of which nothing is known but that it was not heard of for so long is dead."""
MAX_BYTES = 4096
"""An owner file is much shorter."""
NO_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST}
"""Errors of a place where nothing can be written: who is refused there does nobody any harm, and needs not own it."""

_held: set[str] = set()
"""Tokens of what this process owns."""


@dataclass(frozen=True)
class Owner:
    """A process that works on something.

    Attributes:
        host: name of its machine.
        boot: which boot of the machine; empty where the system does not say.
        space: which space of process ids, as containers have their own; likewise.
        pid: its process id.
        started: when the process began, in ticks since the boot; likewise.
        begun: when it began to work on it, in seconds since 1970.
        token: of this ownership alone.
    """

    host: str
    boot: str
    space: str
    pid: int
    started: str
    begun: float
    token: str

    @staticmethod
    def new() -> Owner:
        """Returns this process as the owner of one more thing."""
        process = _process(os.getpid())
        return Owner(
            host=socket.gethostname(),
            boot=_boot(),
            space=_space(),
            pid=os.getpid(),
            started=process[1] if process is not None else "",
            begun=time.time(),
            token=secrets.token_hex(8),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Any) -> Owner | None:
        """Reads the JSON form; None for anything else, such as what was half written when its process was killed."""
        try:
            owner = Owner(**data)
        except TypeError:
            return None
        kinds: dict[str, type] = {"pid": int, "begun": float}
        sound = all(isinstance(getattr(owner, field.name), kinds.get(field.name, str)) for field in fields(Owner))
        return owner if sound and owner.pid > 0 else None

    def is_alive(self, silent: Callable[[], float]) -> bool:
        """Returns whether the process still works on it.

        Args:
            silent: returns how many seconds ago it was last heard of; asked only where nothing else is known.
        """
        if self.host == socket.gethostname():
            if self.boot != _boot():
                return False
            if self.space == _space():
                running = self._is_running()
                if running is not None:
                    return running
        return abs(silent()) < SILENT_SECONDS

    def _is_running(self) -> bool | None:
        """Whether the process runs on this machine; None where another one may have its id."""
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass
        process = _process(self.pid)
        if process is not None and process[0] in "ZX":  # killed, but its parent has not asked how it ended
            return False
        if process is None or not self.started:
            return self.token in _held if self.pid == os.getpid() else None
        if self.started != process[1]:
            return False
        return self.pid != os.getpid() or self.token in _held

    def refusal(self, what: str, choose: str) -> str:
        """Returns the sentence that sends another process away.

        Args:
            what: what is owned.
            choose: what else could be done.
        """
        age = readable_age(time.time() - self.begun)
        known = self.host == socket.gethostname()
        later = "" if known else f"try again in {readable_age(SILENT_SECONDS)} if it was killed, "
        return (
            f"{what} is in use: process {self.pid} on {self.host} has been at work on it for {age}; wait until it is done, "
            f"stop it, {later}or {choose}"
        )


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Makes this process the owner of a folder as long as the block runs; the folder is made if it is not there.

    Raises:
        ArtefactError: a live process is its owner, be it this one; or the folder cannot be written.
    """
    with own(str(folder), owner_of_folder(folder), "choose another folder"):
        yield


@contextmanager
def own_file(path: Path) -> Iterator[None]:
    """Makes this process the owner of a file, or of a folder that will be moved; neither need be there.

    Raises:
        ArtefactError: a live process is its owner, be it this one; or the folder that it is in cannot be written.
    """
    with own(str(path), owner_of_file(path), "choose another file"):
        yield


@contextmanager
def own(what: str, file: Path, choose: str) -> Iterator[None]:
    """Makes this process the owner of something as long as the block runs.

    Args:
        what: what is owned, for the message.
        file: its owner file; the folder that it is in is made.
        choose: what another process could do instead.

    Raises:
        ArtefactError: a live process is its owner, be it this one; or the owner file cannot be written.
    """
    owner, file = Owner.new(), file.absolute()
    with held(owner):
        try:
            _take(what, file, owner, choose)
            with heard_of(lambda: _touch(file, owner)):
                yield
        finally:
            _release(file, owner)


def release_dead(file: Path) -> bool:
    """Removes an owner file unless its owner is alive; returns whether there is none now."""
    try:
        with _locked(file, os.O_RDWR) as descriptor:
            if _living(descriptor, file) is not None:
                return False
            file.unlink()
    except FileNotFoundError:
        pass
    except OSError:  # whose owner cannot be read is nobody's to remove
        return False
    return True


@contextmanager
def heard_of(beat: Callable[[], None]) -> Iterator[None]:
    """Calls `beat` from time to time as long as the block runs; what it raises is left for the work itself to find."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(BEAT_SECONDS):
            with suppress(Exception):
                beat()

    thread = threading.Thread(target=run, name="moacompress-owner", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def held(owner: Owner) -> Iterator[None]:
    """Marks an ownership as one that this process has: what it no longer has is nobody's, though the process lives."""
    _held.add(owner.token)
    try:
        yield
    finally:
        _held.discard(owner.token)


def readable_age(seconds: float) -> str:
    """Returns a time span as a person says it, in the largest unit of which there is one."""
    units = {"day": 86400, "hour": 3600, "minute": 60, "second": 1}
    unit, size = next(((unit, size) for unit, size in units.items() if seconds >= size), ("second", 1))
    count = max(int(seconds // size), 0)
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"


def _take(what: str, file: Path, owner: Owner, choose: str) -> None:
    """Writes the owner file, unless there is that of a living owner."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file, os.O_RDWR | os.O_CREAT) as descriptor:
            other = _living(descriptor, file)
            if other is not None:
                raise ArtefactError(other.refusal(what, choose))
            try:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(owner.to_dict()).encode(), 0)
            except OSError:
                file.unlink()
                raise
    except OSError as error:
        if error.errno not in NO_PLACE:
            raise ArtefactError(f"cannot write {file}: {error.strerror or error}") from error


def _touch(file: Path, owner: Owner) -> None:
    with _locked(file, os.O_RDWR) as descriptor:
        if _read(descriptor) == owner:
            os.utime(descriptor)


def _release(file: Path, owner: Owner) -> None:
    if owner.pid != os.getpid():  # a fork of the owner
        return
    with suppress(OSError), _locked(file, os.O_RDWR) as descriptor:
        if _read(descriptor) == owner:
            file.unlink()


@contextmanager
def _locked(file: Path, flags: int) -> Iterator[int]:
    """Opens the owner file that is at `file` once nobody else has it locked."""
    while True:
        descriptor = os.open(file, flags | os.O_CLOEXEC, 0o666)
        try:
            with suppress(OSError):  # no such locks on this file system
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, file):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether the open file is still the one at `file`, and was not removed while this process waited for it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _living(descriptor: int, file: Path) -> Owner | None:
    """Returns the owner if it is alive."""
    owner = _read(descriptor)
    alive = owner is not None and owner.is_alive(lambda: _now(file.parent) - os.fstat(descriptor).st_mtime)
    return owner if alive else None


def _read(descriptor: int) -> Owner | None:
    try:
        return Owner.from_dict(json.loads(os.pread(descriptor, MAX_BYTES, 0)))
    except (ValueError, RecursionError):
        return None


def _now(folder: Path) -> float:
    """Returns the time by the clock that stamps the files of a folder, which may be another machine's."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def _process(pid: int) -> tuple[str, str] | None:
    """Returns the state of a process and when it began; None where the system does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace")
    except OSError:
        return None
    after_name = stat.rpartition(")")[2].split()  # a name may have spaces and brackets
    return (after_name[0], after_name[19]) if len(after_name) > 19 else None


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
