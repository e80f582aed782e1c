"""Files on disk: atomic writes, bounded reads, fingerprints. Every artefact is written aside and moved into place."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moacompress.core.errors import ArtefactError

MAX_JSON_BYTES = 64 * 2**20


def canonical_json(value: Any) -> str:
    """Returns one line of JSON with sorted keys: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """Returns a short SHA-256 (16 hex digits) of a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


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
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Like `write_text`, for bytes."""
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise ArtefactError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically; non-finite floats become null."""
    write_text(path, json.dumps(finite_json(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def append_line(path: Path, value: Any) -> None:
    """Adds one line of JSON to a file that a run which was stopped goes on from.

    Raises:
        ArtefactError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            # the line break comes first as well: what a kill left half-written must not swallow this line
            file.write(f"\n{canonical_json(value)}\n")
    except OSError as error:
        raise ArtefactError(f"cannot write {path}: {error.strerror or error}") from error


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a file that `append_line` wrote; one may have been cut off.

    Raises:
        ArtefactError: the file cannot be read.
    """
    try:
        return path.read_text("utf-8", errors="replace").split("\n")
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror or error}") from error


def read_json(path: Path, what: str, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Reads JSON of a bounded size.

    Args:
        path: the file.
        what: what the file is, for the message ("plan", "profile").
        max_bytes: the largest size that is read.

    Raises:
        ArtefactError: missing, too large, not UTF-8 or not JSON.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ArtefactError(f"{what} {path} has {size:,} bytes; at most {max_bytes:,} are read")
        return json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ArtefactError(f"cannot read {what} {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of thousands of digits, too deep
        raise ArtefactError(f"{what} {path} is not valid JSON: {error}") from error


@contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `target` that is moved into place when the block ends well.

    Args:
        target: the folder to make.
        overwrite: replace an existing `target`; otherwise it is refused before the block runs.

    Raises:
        ArtefactError: `target` exists and `overwrite` is False, or the folder cannot be written.
    """
    target = Path(target)
    if target.exists() and not overwrite:
        raise ArtefactError(f"{target} exists already; choose another folder or pass --overwrite")
    for stale in target.parent.glob(f".{target.name}.*.partial"):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial"))
        aside.chmod(0o777 & ~_umask())
    except OSError as error:
        raise ArtefactError(f"cannot write beside {target}: {error.strerror or error}") from error
    try:
        yield aside
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial"))
            os.replace(target, old / "old")
            os.replace(aside, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(aside, target)
    except OSError as error:
        raise ArtefactError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
