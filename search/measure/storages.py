"""The storages that a search can keep its studies in, opened so that many processes may write to one at the same time.

All rests on two things that a storage must do as one: give every new trial the next number of its study, and refuse to change
the state of a trial that has finished. A journal does both by the order of its lines, PostgreSQL by locks of rows.
SQLite has no locks of rows, and what Optuna reads before it writes is not part of its transaction there; so every
transaction of SQLite begins with the lock of the whole file.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import sqlite3
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moacompress.core.errors import ArtefactError, RecipeError
from moacompress.core.urls import without_password

if TYPE_CHECKING:
    from optuna.storages import BaseStorage, RDBStorage

JOURNAL_SUFFIXES = (".log", ".journal")
LOCK_GRACE = 5
"""Seconds after which the lock of a killed process is taken over; a lock is held for milliseconds."""
SQLITE_PATIENCE = 60.0
"""Seconds that a process waits for SQLite's lock of the file, which is held for milliseconds."""
DATABASES = ("sqlite", "postgresql")
"""How URLs begin, of what is tested with many workers."""
DRIVER = "psycopg"
"""PostgreSQL's driver where a URL names none: SQLAlchemy's own choice depends on its version."""
OPENING = 30
"""Times that a database is opened again where another process makes its tables at the same moment."""
AT_THE_SAME_MOMENT = ("already exists", "duplicate", "unique", "locked", "deadlock")
"""What databases say of that."""


def open_storage(storage: str | None) -> BaseStorage:
    """Opens a storage: memory (None), a journal file ending in .log or .journal, or a database URL.

    Raises:
        RecipeError: `storage` is none of these.
        ArtefactError: it cannot be used.
    """
    from optuna.storages import InMemoryStorage, get_storage

    if storage is None:
        return InMemoryStorage()
    path = None if "://" in storage else journal_file(storage)
    if path is None and not storage.startswith(DATABASES):
        raise RecipeError(
            f"{shown(storage)} is of no database that searches are shared over; give a file ending in .journal, "
            "sqlite:///FILE or postgresql://USER@HOST/NAME"
        )
    with guarded(shown(storage)):
        return get_storage(_database(storage) if path is None else _journal(path))


def _database(url: str) -> RDBStorage:
    from optuna.exceptions import OptunaError
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import SQLAlchemyError

    sqlite = url.startswith("sqlite")
    if url.startswith("postgresql://"):
        if importlib.util.find_spec(DRIVER) is None:
            raise ImportError(f"its driver {DRIVER} is not installed; pip install 'moacompress[postgresql]'")
        url = url.replace("postgresql", f"postgresql+{DRIVER}", 1)
    settings = {"connect_args": {"timeout": SQLITE_PATIENCE}} if sqlite else {"pool_pre_ping": True}
    for left in reversed(range(OPENING)):
        try:
            storage = RDBStorage(url, engine_kwargs=dict(settings))
            break
        except (OptunaError, SQLAlchemyError) as error:
            if not left or not any(words in str(error).lower() for words in AT_THE_SAME_MOMENT):
                raise
            time.sleep(random.uniform(0.05, 0.3))
    if sqlite and storage.engine.url.database not in (None, "", ":memory:"):
        _lock_at_once(storage)
    return storage


def _lock_at_once(storage: RDBStorage) -> None:
    """Lets every transaction of a SQLite storage begin with the lock of the file."""
    from sqlalchemy import event

    def connected(connection: sqlite3.Connection, record: Any) -> None:
        connection.isolation_level = None  # Python's driver begins no transactions of its own

    def begun(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    storage.engine.dispose()
    event.listen(storage.engine, "connect", connected)
    event.listen(storage.engine, "begin", begun)


def journal_file(storage: str) -> Path:
    """Returns the path of a journal.

    Raises:
        RecipeError: it does not end as journals do.
    """
    if not storage.endswith(JOURNAL_SUFFIXES):
        raise RecipeError(
            f"storage {shown(storage)!r} is neither a journal file ending in .journal or .log nor a URL such as "
            "sqlite:///study.db"
        )
    return Path(storage).absolute()


def is_journal(storage: str | None, path: Path) -> bool:
    """Returns whether a file is a storage's journal."""
    return storage is not None and "://" not in storage and Path(storage).absolute() == path.absolute()


def _journal(path: Path) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    class Lock(JournalFileOpenLock):
        """A lock whose holder finds whole lines only: what a killed process left of its last one is cut."""

        def acquire(self) -> bool:
            acquired = super().acquire()
            try:
                _drop_half_line(path)
            except BaseException:
                self.release()
                raise
            return acquired

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(str(path), grace_period=LOCK_GRACE)
    backend = JournalFileBackend(str(path), lock_obj=lock)
    lock.acquire()
    lock.release()
    return JournalStorage(backend)


def _drop_half_line(path: Path) -> None:
    """Cuts what a killed process left of its last line; the journal would be unreadable after the next one."""
    with path.open("rb+") as file:
        if not file.seek(0, os.SEEK_END):
            return
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


@contextmanager
def guarded(where: str) -> Iterator[None]:
    """Turns whatever a storage raises into one error that names it, without user and password."""
    from optuna.exceptions import OptunaError, StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (OptunaError, SQLAlchemyError, OSError, ImportError, ValueError, KeyError) as error:
        told = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
        reason = " ".join(without_password(str(told) or type(told).__name__).split())
        raise ArtefactError(
            f"cannot use the study storage {where}: {reason[:300]}; check that it is there and writable, or "
            "choose another one with --storage"
        ) from error


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keeps Optuna's log and its warnings about experimental parts off the screen; its settings are set back."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def shown(storage: str | None) -> str:
    """Returns a storage as it may be shown: without user, password and query."""
    if storage is None:
        return "in memory"
    scheme, mark, rest = without_password(storage).partition("://")
    return f"{scheme}{mark}{re.sub(r'^[^/@]*@', '', rest.partition('?')[0] if mark else rest)}"
