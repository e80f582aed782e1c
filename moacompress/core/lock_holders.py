"""Who works on a file or a folder: one process at a time. What a dead one left is taken over without a question.

A process that works on something holds the lock of a lock holder file, in the folder or beside the file, and removes it when
it is done. The operating system gives the lock up when the process dies, however that happens, so a file that is left is in
nobody's way. The file says who holds it, for whoever is refused.

Machines that share a disk need not share its locks. So a lock holder file from elsewhere counts for as long as its lock
holder sends heartbeats, lock or not: it touches its file as long as it works. Elsewhere is whatever is not this boot
of this machine, as two machines may have one name. The lock holder of what is not in a file, such as a study in a database,
is kept there (`LockHolder.to_dict`).
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from moacompress.core.artefact_names import holder_of_file, holder_of_folder
from moacompress.core.errors import ArtefactError, InUseError

BEAT_SECONDS = 30.0
"""Between the heartbeats of a lock holder."""
SILENT_SECONDS = 300.0
"""A lock holder that has sent no heartbeat for so long is dead, where nothing else is known of it."""
PATIENCE = 0.3
"""Seconds for which a lock may be held by nobody who works: by one that looks, comes or goes."""
MAX_BYTES = 4096
"""A lock holder file is much shorter."""
MAX_PID = 1 << 31
"""Process ids are below this."""
NO_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST}
"""Errors of a place where nothing can be written: who is refused there does nobody any harm, and needs not own it."""
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
"""Errors of a file system without locks: there a lock holder counts for as long as it sends heartbeats, or its process runs."""

_held: set[str] = set()
"""Tokens of what this process owns."""


@dataclass(frozen=True)
class LockHolder:
    """A process that works on something.

    Attributes:
        host: name of its machine.
        boot: which boot of the machine; empty where the system does not say.
        pid_namespace: its namespace of process ids, of which each container has one; empty where that is not known.
        pid: its process id.
        started: when the process began, in ticks since the boot; empty where that is not known.
        begun: when it began to work on it, in seconds since 1970.
        token: of this ownership alone.
    """

    host: str
    boot: str
    pid_namespace: str
    pid: int
    started: str
    begun: float
    token: str

    @staticmethod
    def new() -> LockHolder:
        """Returns this process as the lock holder of one more thing."""
        return LockHolder(
            host=socket.gethostname(),
            boot=_boot(),
            pid_namespace=_pid_namespace(),
            pid=os.getpid(),
            started=_started(os.getpid()) or "",
            begun=time.time(),
            token=secrets.token_hex(8),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Any) -> LockHolder | None:
        """Reads the JSON form; None for anything else, such as what was half written when its process was killed."""
        kinds: dict[str, type] = {"pid": int, "begun": float}
        names = [field.name for field in fields(LockHolder)]
        if not isinstance(data, dict) or not all(isinstance(data.get(name), kinds.get(name, str)) for name in names):
            return None
        return LockHolder(**{name: data[name] for name in names}) if data["pid"] > 0 else None

    @property
    def shares_locks(self) -> bool:
        """Whether it is of this boot of this machine, be it in another container: one system has all their locks."""
        return self.boot != "" and self.boot == _boot()

    @property
    def is_here(self) -> bool:
        """Whether its process is one of those that this one can look at."""
        return self.shares_locks and self.pid_namespace == _pid_namespace() and self.started != ""

    def is_alive(self, silent: Callable[[], float]) -> bool:
        """Returns whether the process still works on it, where no lock says so.

        `silent` returns the seconds since its last heartbeat; it is asked only where nothing else is known.
        """
        if not self.is_here:
            return abs(silent()) < SILENT_SECONDS
        if self.pid == os.getpid():
            return self.token in _held
        return self.pid < MAX_PID and psutil.pid_exists(self.pid) and _started(self.pid) in (self.started, None)

    def refusal(self, what: str, choose: str) -> str:
        """Returns the sentence that sends another process away from `what`; `choose` is what it could do instead."""
        age = readable_age(time.time() - self.begun)
        later = "" if self.shares_locks else f"try again in {readable_age(SILENT_SECONDS)} if it was killed, "
        return (
            f"{what} is in use: process {self.pid} on {self.host} has been at work on it for {age}; wait until it is done, "
            f"stop it, {later}or {choose}"
        )


def own_folder(folder: Path) -> AbstractContextManager[None]:
    """Makes this process the lock holder of a folder as long as the block runs; the folder is made if it is not there.

    Raises:
        InUseError: a live process is its lock holder, be it this one.
        ArtefactError: the folder cannot be written.
    """
    return own(str(folder), holder_of_folder(folder), "choose another folder")


def own_file(path: Path) -> AbstractContextManager[None]:
    """Makes this process the lock holder of a file, or of a folder that will be moved; neither need be there.

    Raises:
        InUseError: a live process is its lock holder, be it this one.
        ArtefactError: the folder that it is in cannot be written.
    """
    return own(str(path), holder_of_file(path), "choose another file")


@contextmanager
def own(what: str, file: Path, choose: str) -> Iterator[None]:
    """Makes this process the lock holder of something as long as the block runs.

    `file` is the lock holder file, whose folder is made; `what` and `choose` are for the message, see `LockHolder.refusal`.

    Raises:
        InUseError: a live process is its lock holder, be it this one.
        ArtefactError: the lock holder file cannot be written.
    """
    holder, file = LockHolder.new(), file.absolute()
    with held(holder), ExitStack() as ours:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            other = _living(file, ours.enter_context(_locked(file)))
            if other is None:
                ours.callback(_remove, file, holder)
                _write(file, holder)
        except Timeout:
            other = _read(file)
            if other is None:
                raise InUseError(f"{what} is in use: its {file.name} is locked; try again, or {choose}") from None
        except OSError as error:
            if error.errno not in NO_PLACE:
                raise ArtefactError(f"cannot write {file}: {error.strerror or error}") from error
            other = _living(file, locked=False)
        if other is not None:
            raise InUseError(other.refusal(what, choose))
        with heartbeat(lambda: _touch(file, holder)):
            yield


def release_dead(file: Path) -> bool:
    """Removes a lock holder file unless its lock holder is alive; returns whether there is none now."""
    try:
        if file.exists():
            with _locked(file) as locked:
                if _living(file, locked) is not None:
                    return False
                file.unlink(missing_ok=True)
    except OSError:  # it is locked, or cannot be opened: nobody's to remove
        return False
    return True


class HeartbeatMonitor:
    """For how long each of several processes has had the same beat, by this process's clock alone."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._seen: dict[Hashable, tuple[float, float]] = {}

    def silence(self, process: Hashable, beat: float) -> float:
        """Returns for how many seconds a process has been seen with the beat that it has now."""
        now = self._monotonic()
        before, since = self._seen.get(process, (beat, now))
        if beat != before:
            since = now
        self._seen[process] = beat, since
        return now - since


@contextmanager
def heartbeat(beat: Callable[[], object]) -> Iterator[None]:
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
def held(holder: LockHolder) -> Iterator[None]:
    """Marks an ownership as one that this process has: what it no longer has is nobody's, though the process lives."""
    _held.add(holder.token)
    try:
        yield
    finally:
        _held.discard(holder.token)


def readable_age(seconds: float) -> str:
    """Returns a time span as a person says it, in the largest unit of which there is one."""
    units = {"day": 86400, "hour": 3600, "minute": 60, "second": 1}
    unit, size = next(((unit, size) for unit, size in units.items() if seconds >= size), ("second", 1))
    count = max(int(seconds // size), 0)
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"


@contextmanager
def _locked(file: Path) -> Iterator[bool]:
    """Holds the lock of a lock holder file; yields whether there is one, as some file systems have none.

    Raises:
        Timeout: somebody else holds it.
        OSError: the file cannot be opened.
    """
    lock = FileLock(file, PATIENCE, thread_local=False, poll_interval=PATIENCE / 10, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield lock.is_locked
    finally:
        lock.release()


def _living(file: Path, locked: bool) -> LockHolder | None:
    """Returns whom a lock holder file names, if that one is alive; who was here and has lost the lock is not."""
    holder = _read(file)
    gone = holder is None or (locked and holder.shares_locks) or not holder.is_alive(lambda: _silence(file))
    return None if gone else holder


def _read(file: Path) -> LockHolder | None:
    try:
        with file.open("rb") as opened:
            return LockHolder.from_dict(json.loads(opened.read(MAX_BYTES)))
    except (OSError, ValueError, RecursionError):
        return None


def _write(file: Path, holder: LockHolder) -> None:
    """Writes who holds the lock into the locked file, and not another in its place."""
    with file.open("r+b", buffering=0) as opened:
        opened.truncate()
        opened.write(json.dumps(holder.to_dict()).encode())


def _remove(file: Path, holder: LockHolder) -> None:
    """Removes a lock holder file, unless this is a fork of its process, or another took over unknown to this one."""
    if holder.pid == os.getpid() and _read(file) in (holder, None):
        with suppress(OSError):
            file.unlink()


def _touch(file: Path, holder: LockHolder) -> None:
    if _read(file) == holder:
        os.utime(file)


def _silence(file: Path) -> float:
    """Returns the seconds since a lock holder's last heartbeat, by the clock of the file system, maybe another machine's."""
    try:
        with tempfile.TemporaryFile(dir=file.parent) as now:
            return os.fstat(now.fileno()).st_mtime - file.stat().st_mtime
    except OSError:
        return 0.0 if file.exists() else SILENT_SECONDS


def _started(pid: int) -> str | None:
    """Returns when a process began, in ticks since the boot; "" for a dead one, None where the system does not say."""
    # psutil says it by the wall clock, which may be set meanwhile
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace")
    except OSError:
        return None
    state, *rest = stat.rpartition(")")[2].split()  # a name may have spaces and brackets
    return "" if state in "ZX" else rest[18]


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
