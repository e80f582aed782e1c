"""The ledger of measurements: one JSON line for every model and prompt, so that a run that was stopped goes on.

An entry is filed under a hash of everything it depends on, so lines of another plan or other prompts are never
mistaken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moacompress.core.files import append_line, read_lines, remove

Entry = dict[str, float]


class Records:
    """Named numbers in memory and, if a path is given, on disk.

    Args:
        path: the JSON lines file, or None.

    Raises:
        ArtefactError: the file cannot be read.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entries: dict[str, Entry] = {}
        if path is None or not path.exists():
            return
        for line in read_lines(path):
            parsed = _parse(line)
            if parsed is not None:
                self._entries[parsed[0]] = parsed[1]

    def clear(self) -> None:
        """Forgets everything, on disk too.

        Raises:
            ArtefactError: the file cannot be removed.
        """
        self._entries = {}
        if self._path is not None:
            remove([self._path])

    def get(self, key: str) -> Entry | None:
        """Returns the numbers filed under `key`, or None."""
        return self._entries.get(key)

    def add(self, key: str, numbers: Mapping[str, float], **notes: Any) -> None:
        """Files numbers and writes their line; `notes` are for a human reader.

        Raises:
            ArtefactError: the line cannot be written.
        """
        self._entries[key] = dict(numbers)
        if self._path is not None:
            append_line(self._path, {"key": key, "numbers": dict(numbers), **notes})


def _parse(line: str) -> tuple[str, Entry] | None:
    """Reads a line; None for one that was cut off, or is of another kind."""
    try:
        data = json.loads(line)
        numbers = {str(name): float(value) for name, value in data["numbers"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return (str(data["key"]), numbers) if "key" in data and all(map(math.isfinite, numbers.values())) else None
