"""Files on disk: atomic writes, bounded reads, fingerprints. Every artefact is written aside and moved into place.

A folder that takes the place of another is moved there in two steps: the earlier one out of the way, under a name of its own,
and then the new one in. Whenever a process is killed, one of the two is whole, and the next sweep puts it in its place.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moacompress.core.artefact_names import HOLDER, PARTIAL, REPLACED, TEMPORARY, holder_of_file
from moacompress.core.errors import ArtefactError, DataError
from moacompress.core.lock_holders import own_file, release_dead

MAX_JSON_BYTES = 64 * 2**20
_RANDOM = "[0-9a-f]{8}"
"""What makes the name of a folder or file aside its own, see `_beside`."""
_UUID = "[0-9a-f-]{36}"


class BrokenJson(ArtefactError):
    """A file that was read and is no JSON, such as one that was cut off."""


def canonical_json(value: Any) -> str:
    """Returns one line of JSON with sorted keys: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """Returns a short SHA-256 (16 hex digits) of a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def digest_files(root: Path) -> str:
    """Returns a short SHA-256 (16 hex digits) of a file, or of a folder: of the names and the contents of its files.

    Raises:
        DataError: it is not there, or one of the files cannot be read.
    """
    digest = hashlib.sha256()
    try:
        root.stat()
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if path.is_file():
                digest.update(str(path.relative_to(root)).encode())
                with path.open("rb") as file:
                    for block in iter(lambda: file.read(1 << 20), b""):
                        digest.update(block)
    except OSError as error:
        raise DataError(f"cannot read {root}: {error.strerror or error}") from error
    return digest.hexdigest()[:16]


def finite_json(value: Any) -> Any:
    """Returns `value` with tuples as lists and non-finite floats as null, ready for strict JSON."""
    if isinstance(value, dict):
        return {str(key): finite_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is either the old one or the whole new one, also after a power cut.

    Raises:
        ArtefactError: the folder cannot be written (missing, read-only, disk full); nothing is left behind.
    """
    write_bytes(path, _encoded(text))


def write_bytes(path: Path, data: bytes) -> None:
    """Like `write_text`, for bytes; into a device or a pipe, which no file may replace, it writes as it is."""
    path = Path(path)
    try:
        if path.is_block_device():
            raise ArtefactError(f"cannot write {path}: it is a disk")
        if path.exists() and not path.is_file() and not path.is_dir():
            with path.open("wb") as there:
                there.write(data)
            return
    except OSError as error:
        raise ArtefactError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error
    _write_and_move({path: data})


def write_texts(texts: Mapping[Path, str]) -> None:
    """Writes files that are of one another: all are whole on the disk before the first is moved into its place.

    Raises:
        ArtefactError: one of them cannot be written; names it, and what was moved before.
    """
    _write_and_move({path: _encoded(text) for path, text in texts.items()})


def _encoded(text: str) -> bytes:
    """Returns UTF-8, in which half a character that JSON may hold is spelt out, as JSON itself does."""
    return text.encode(errors="backslashreplace")


def _write_and_move(contents: Mapping[Path, bytes]) -> None:
    aside, moved, path = dict[Path, Path](), list[str](), Path()
    try:
        for path, data in contents.items():
            aside[path] = _write_aside(path, data)
        for path, temporary in aside.items():
            os.replace(temporary, path)
            moved.append(str(path))
    except OSError as error:
        for temporary in aside.values():
            temporary.unlink(missing_ok=True)
        done = f"{', '.join(moved)} was written" if moved else "nothing was changed"
        raise ArtefactError(f"cannot write {path}: {error.strerror or error}; {done}") from error


def _write_aside(path: Path, data: bytes) -> Path:
    """Writes what a file is to hold to the disk beside its place, and returns where; where that fails nothing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path, TEMPORARY)
    opened = temporary.open("xb")  # a name that nothing else has, with the mode that the umask leaves
    try:
        with opened as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically; non-finite floats become null."""
    write_text(path, json.dumps(finite_json(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, what: str, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Reads JSON of a bounded size; `what` says in messages what the file is ("plan", "profile").

    Raises:
        BrokenJson: not UTF-8 or not JSON.
        ArtefactError: missing, cannot be opened, or too large.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ArtefactError(f"{what} {path} has {size:,} bytes; at most {max_bytes:,} are read")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)  # a link may lead to a device, which has no size and no end
        if len(data) > max_bytes:
            raise ArtefactError(f"{what} {path} has no end; at most {max_bytes:,} bytes are read")
        return json.loads(data.decode("utf-8"))
    except OSError as error:
        raise ArtefactError(f"cannot read {what} {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of thousands of digits, too deep
        raise BrokenJson(f"{what} {path} is not valid JSON: {error}") from error


def check_no_link(*paths: Path) -> None:
    """Refuses a link in the place of a file that is appended to or copied, or of a folder that files are written into.

    It could lead out of a folder that somebody else made.

    Raises:
        ArtefactError: there is one.
    """
    for path in paths:
        if path.is_symlink():
            raise ArtefactError(f"{path} is a link, which is not followed; remove it, or choose another place")


@contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `target` that is moved into place when the block ends well.

    Without `overwrite`, a `target` that is not empty is refused, before the block runs if it is there by then.

    Raises:
        ArtefactError: `target` exists and `overwrite` is False, or the folder cannot be written.
    """
    target = Path(target)
    if target.is_symlink():  # the folder that it leads to is made, on the disk where that is
        target = Path(os.path.realpath(target))
    sweep_folders(target)
    if not overwrite:
        _refuse(target)
    with _aside(target) as aside:
        try:
            aside.mkdir(parents=True)
        except OSError as error:
            raise ArtefactError(f"cannot write beside {target}: {error.strerror or error}") from error
        try:
            yield aside
            _open_to_all(aside)
            if overwrite:
                _put(aside, target)
            else:
                _refuse(target)
                os.replace(aside, target)
        except OSError as error:
            raise ArtefactError(f"cannot write {target}: {error.strerror or error}") from error


def remove(paths: Iterable[Path]) -> None:
    """Removes files and folders, one after another; each is there whole or not at all, also where this is interrupted.

    What is not there is passed over. Of a link only the link is removed.

    Raises:
        ArtefactError: one of them cannot be removed.
    """
    for path in paths:
        try:
            if path.is_dir() and not path.is_symlink():
                with _aside(path) as aside:
                    os.replace(path, aside)
            else:
                path.unlink(missing_ok=True)
        except (NotADirectoryError, FileNotFoundError):  # no such folder, or another process was faster
            continue
        except OSError as error:
            raise ArtefactError(f"cannot remove {path}: {error.strerror or error}") from error


def is_within(path: str | Path, folder: str | Path) -> bool:
    """Whether a file or folder is a folder or lies in it, links followed on both sides; neither need be there."""
    real, around = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return around in (real, *real.parents)


def sweep_folders(target: Path) -> None:
    """Removes what dead processes left of a folder that they were making or removing; what a live one makes stays.

    Where a process was killed while it put one folder in the place of another, and neither is there, the earlier one is again.
    """
    ends = f"{re.escape(PARTIAL)}|{re.escape(REPLACED)}"
    name = re.compile(rf"\.?(\.{re.escape(target.name)}\.{_RANDOM}(?:{ends}))(?:{re.escape(HOLDER)})?")
    for folder in {target.parent / match[1] for match in map(name.fullmatch, _names(target.parent)) if match}:
        if not release_dead(holder_of_file(folder)):
            continue
        if folder.suffix == REPLACED:
            _give_back(folder, target)
        else:
            _delete(folder)


def sweep_files(path: Path) -> None:
    """Removes what killed processes left of a file that they were writing; only the lock holder of the file may do that.

    Of a lock of Optuna's that is what it is moved to before it is removed.
    """
    name = re.escape(path.name)
    left = re.compile(rf"\.{name}\.{_RANDOM}{re.escape(TEMPORARY)}|{name}{_UUID}\.rename")
    for found in filter(left.fullmatch, _names(path.parent)):
        (path.parent / found).unlink(missing_ok=True)


def holds_something(path: Path) -> bool:
    """Whether there is a file, or a folder that is not empty."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def _open_to_all(folder: Path) -> None:
    """Gives the files in a folder that was made the mode of any other file: safetensors lets their owner alone read them.

    What the umask allows is read off the folder itself: to ask for it a process must set it, for its other threads too.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | mode)


def _refuse(target: Path) -> None:
    if holds_something(target):
        raise ArtefactError(f"{target} exists already; choose another folder or pass --overwrite")


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """Yields a new name beside a folder, for what is made of it or goes; what has that name in the end is removed."""
    path = _beside(target, PARTIAL)
    with own_file(path):
        try:
            yield path
        finally:
            _delete(path)


def _beside(target: Path, end: str) -> Path:
    return target.parent / f".{target.name}.{secrets.token_hex(4)}{end}"


def _put(aside: Path, target: Path) -> None:
    """Moves a folder into place, over what is there; if that fails, what was there is there again.

    A process that is killed between the two moves leaves both folders whole, and `sweep_folders` puts the earlier one back.
    """
    if not os.path.lexists(target):
        os.replace(aside, target)
        return
    old = _beside(target, REPLACED)
    with own_file(old):
        try:
            os.replace(target, old)
            os.replace(aside, target)
        finally:
            _give_back(old, target)


def _give_back(old: Path, target: Path) -> None:
    """Gives a folder that was moved out of the way its place again, unless another has taken it; then it is removed."""
    if not os.path.lexists(old):
        return
    if not os.path.lexists(target):
        with suppress(FileNotFoundError):  # another process has just done it
            os.replace(old, target)
        return
    with suppress(OSError), _aside(target) as going:  # what is half removed must not be given back
        os.replace(old, going)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # it is not there, or no folder
        return []
