"""What was measured, one JSON line for each cell, so that a benchmark that was stopped goes on.

The file belongs to one configuration, which is its first line: times that were taken otherwise, or on another machine, are
never mixed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moacompress.core.artefact_names import BENCH_FILE, cells_file, of_bench
from moacompress.core.errors import ArtefactError
from moacompress.core.files import append_line, canonical_json, finite_json, read_json, read_lines, remove


class CellStore:
    """Measured cells in memory and, if a path is given, on disk beside the result.

    Args:
        out: where the result will be written, or None: then nothing is kept on disk.
        configuration: what the times depend on, as JSON values.
        overwrite: start anew, whatever is there.

    Raises:
        ArtefactError: the result or the cells that are there are of another configuration, or cannot be read.
    """

    def __init__(self, out: Path | None, configuration: Mapping[str, Any], overwrite: bool = False) -> None:
        self.configuration: dict[str, Any] = json.loads(canonical_json(finite_json(dict(configuration))))
        self._path: Path | None = None
        self._cells: dict[str, dict[str, Any]] = {}
        self._stale: list[Path] = []
        if out is None:
            return
        if out.is_dir():
            raise ArtefactError(f"{out} is a folder; name a file, such as {out / BENCH_FILE}")
        self._path = cells_file(out)
        if overwrite:
            self._stale = of_bench(out)
            return
        for path, found in ((out, _of_result(out)), (self._path, self._read())):
            if found is not None and found != self.configuration:
                raise ArtefactError(
                    f"{path} is {_difference(found, self.configuration)}; choose another file or pass --overwrite"
                )

    def begin(self) -> None:
        """Makes the file, once: a folder that cannot be written is found before the first minute of work.

        What is there and is not to count any more goes now, when all that can be wrong with the request was found.

        Raises:
            ArtefactError: it cannot be written.
        """
        if self._path is None:
            return
        remove(self._stale)
        self._stale = []
        if not self._path.exists():
            self._append({"configuration": self.configuration})

    def get(self, key: str) -> dict[str, Any] | None:
        """Returns the cell filed under `key`, or None."""
        return self._cells.get(key)

    def add(self, key: str, cell: Mapping[str, Any]) -> None:
        """Files a cell.

        Raises:
            ArtefactError: its line cannot be written.
        """
        self.begin()
        self._cells[key] = dict(cell)
        self._append({"key": key, "cell": dict(cell)})

    def _append(self, value: Mapping[str, Any]) -> None:
        if self._path is not None:
            append_line(self._path, finite_json(dict(value)))

    def _read(self) -> dict[str, Any] | None:
        """Reads the cells; returns the configuration they are of, None where there is no file."""
        if self._path is None or not self._path.exists():
            return None
        configuration: dict[str, Any] = {}
        for line in read_lines(self._path):
            data = _parse(line)
            if isinstance(data.get("configuration"), dict):
                configuration = data["configuration"]
            elif isinstance(data.get("key"), str) and isinstance(data.get("cell"), dict):
                self._cells[data["key"]] = data["cell"]
        return configuration


def _parse(line: str) -> dict[str, Any]:
    """Reads a line; nothing for one that was cut off."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _of_result(out: Path) -> dict[str, Any] | None:
    if not out.exists():
        return None
    data = read_json(out, "benchmark")
    found = data.get("configuration") if isinstance(data, dict) else None
    return found if isinstance(found, dict) else {}


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    if not found:
        return "no benchmark of this tool"
    names = [name for name in wanted if found.get(name) != wanted[name]]
    if not names:
        return "a benchmark of another configuration"
    parts = ", ".join(
        f"{name} {_short(found.get(name))} where this one has {_short(wanted[name])}" for name in names[:3]
    )
    return f"a benchmark of another configuration: {parts}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
