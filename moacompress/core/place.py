"""The place where a command is going to write, looked at before anything is loaded, and left as it was where it fails."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moacompress.core.errors import ArtefactError


def check_replaceable(file: Path, is_ours: Callable[[str], bool], what: str) -> None:
    """Refuses a file that is not of the kind that is to be written there.

    `is_ours` is told the first 4,096 characters of what is there; `what` is written, with its article.

    Raises:
        ArtefactError: a folder, or something else that is not empty.
    """
    if not file.is_file() and not file.is_dir():  # nothing, or a pipe, of which nothing must be read
        return
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            there = stream.read(4096)
    except OSError as error:
        raise ArtefactError(f"{file} cannot be replaced by {what}: {error.strerror or error}") from error
    if there and not is_ours(there):
        raise ArtefactError(f"{file} exists already and is not {what}; choose another file")


def check_writable(folder: Path) -> None:
    """Refuses a folder that nothing can be written to, or that cannot be made.

    Raises:
        ArtefactError: it, or the nearest folder above it that is there, is a file or cannot be written.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    name = "it" if there == folder.absolute() else there
    if not there.is_dir():
        raise ArtefactError(f"cannot write to {folder}: {name} is not a folder; choose another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ArtefactError(f"cannot write to {folder}: {name} may not be written; choose another folder")


def named_folder(folder: str | Path) -> Path:
    """Returns a folder by a path that ends in its name, which `.` does not.

    Raises:
        ArtefactError: it has none, as `/`.
    """
    path = Path(folder)
    path = path if path.name else path.absolute()
    if not path.name:
        raise ArtefactError(f"{folder} is no folder that can be made; choose another one")
    return path


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Says in one error what libraries say of files that they cannot write, as on a full disk, each in its own way.

    Raises:
        ArtefactError: one of them could not.
    """
    try:
        yield
    except Exception as error:
        of_torch = isinstance(error, RuntimeError) and re.search("inline_container|iostream error", str(error))
        if not (of_torch or isinstance(error, OSError) or type(error).__name__ == "SafetensorError"):
            raise
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        raise ArtefactError(
            f"cannot write to {folder}: {reason}; {free:,} bytes are free there: make room and run the same command again"
        ) from error


@contextmanager
def no_empty_folder(folder: Path) -> Iterator[None]:
    """Removes the folders that were made for `folder` while the block ran, where it fails and nothing is in them."""
    path = folder.absolute()
    missing = [each for each in (path, *path.parents) if not os.path.lexists(each)]
    try:
        yield
    except BaseException:
        for each in missing:
            with suppress(OSError):  # there is something in it
                each.rmdir()
        raise
