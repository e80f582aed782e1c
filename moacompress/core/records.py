"""The one log that a stopped run resumes from: a file of JSON lines, one for each thing that is finished.

A line is filed under keys that hash everything it depends on, so that lines of another plan or other prompts are never
mistaken. A file that belongs to one configuration has it as its first line. Reading changes nothing on disk; a last line that a
kill left half-written is cut off when the next one is added.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from moacompress.core.errors import ArtefactError
from moacompress.core.files import canonical_json, check_no_link

V = TypeVar("V")
JsonLine = dict[str, Any]
Entry = dict[str, float]
NAMED_LINES = 5
"""Most numbers of unreadable lines in one warning."""

logger = logging.getLogger(__name__)


class Records(Generic[V]):
    """Values by key in memory and, if a path is given, on disk.

    Args:
        path: made with the first line.
        values_of: returns the values of a line by key; raises ValueError, KeyError, TypeError or AttributeError where the line
            is of another kind.
        header: the first line of the file, or None for one without.
        resume: read what is there. Otherwise it counts as empty, and whoever opens it removes the file before the first line.

    Attributes:
        header: the first line that was found, `{}` where it is of another kind; None where no file was read, or files of this
            kind have none.

    Raises:
        ArtefactError: the file cannot be read, or is a link.
    """

    def __init__(
        self,
        path: Path | None,
        values_of: Callable[[JsonLine], Mapping[str, V]],
        header: JsonLine | None = None,
        resume: bool = True,
    ) -> None:
        self._path, self._values_of, self._wanted = path, values_of, header
        self._values: dict[str, V] = {}
        self.header: JsonLine | None = None
        if path is not None:
            check_no_link(path)
        if path is not None and resume:
            self._read(path)
        self._begun = path is None or header is None or self.header is not None

    def __len__(self) -> int:
        """Returns how many values there are."""
        return len(self._values)

    def get(self, key: str) -> V | None:
        """Returns the value filed under `key`, or None."""
        return self._values.get(key)

    def begin(self) -> None:
        """Writes the header where there is none yet, so that one that cannot be written is found before the work.

        Raises:
            ArtefactError: it cannot be written.
        """
        if not self._begun and self._path is not None and self._wanted is not None:
            _append(self._path, self._wanted)
            self._begun = True

    def append(self, line: Mapping[str, Any]) -> None:
        """Files the values of a line, and writes it.

        Raises:
            ArtefactError: it cannot be written; nothing is filed.
        """
        self.begin()
        values = self._values_of(dict(line))
        if self._path is not None:
            _append(self._path, line)
        self._values |= values

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_bytes().split(b"\n")
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise ArtefactError(f"cannot read {path}: {error.strerror or error}") from error
        unreadable: list[int] = []
        for number, text in enumerate(lines, 1):
            if not text.strip():
                continue
            line = _parsed(text)
            if self._wanted is not None and self.header is None:
                if not line and len(lines) == 1:  # a first line that was cut off
                    return
                self.header = line if line.keys() == self._wanted.keys() else {}
                if not self.header:  # of something else: no line of it counts
                    return
                continue
            try:
                self._values |= self._values_of(line)
            except (ValueError, KeyError, TypeError, AttributeError):
                unreadable.append(number)
        if unreadable:
            more = len(unreadable) - NAMED_LINES
            named = ", ".join(map(str, unreadable[:NAMED_LINES])) + (f" and {more:,} more" if more > 0 else "")
            logger.warning("%s: cannot read line %s; what was there is computed again", path, named)


def named_numbers(line: JsonLine) -> dict[str, Entry]:
    """Returns the numbers of a line `{"key": ..., "numbers": {name: number}}`, which may hold notes for a reader too.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is another kind of line, or a number is not finite.
    """
    numbers = {str(name): float(value) for name, value in line["numbers"].items()}
    if not all(map(math.isfinite, numbers.values())):
        raise ValueError("not finite")
    return {str(line["key"]): numbers}


def _parsed(text: bytes) -> JsonLine:
    """Returns the object on a line; an empty one where there is none."""
    try:
        line = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return {}
    return line if isinstance(line, dict) else {}


def _append(path: Path, line: Mapping[str, Any]) -> None:
    data = canonical_json(dict(line)).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            end_last_line(file)
            file.write(data)
    except OSError as error:
        raise ArtefactError(
            f"cannot write {path}: {error.strerror or error}; what was written before is kept"
        ) from error


def end_last_line(file: BinaryIO) -> None:
    """Ends a last line that lacks its end, or cuts it off where it is not whole; the file is open as `a+b`."""
    size = file.seek(0, 2)
    if not size:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    last = file.read().rpartition(b"\n")[2]
    if _parsed(last):
        file.write(b"\n")
    else:
        file.truncate(size - len(last))
