"""What was measured, one JSON line for each cell, so that a stopped benchmark resumes.

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
from moacompress.core.files import canonical_json, finite_json, read_json, remove
from moacompress.core.records import Records


class CellStore(Records[dict[str, Any]]):
    """Measured cells in memory and, if a path is given, on disk beside the result.

    The configuration is what the times depend on, as JSON values.

    Raises:
        ArtefactError: the result or the cells that are there are of another configuration, or cannot be read.
    """

    def __init__(self, out: Path | None, configuration: Mapping[str, Any], overwrite: bool = False) -> None:
        if out is not None and out.is_dir():
            raise ArtefactError(f"{out} is a folder; name a file, such as {out / BENCH_FILE}")
        self.configuration: dict[str, Any] = json.loads(canonical_json(finite_json(dict(configuration))))
        path = None if out is None else cells_file(out)
        super().__init__(path, _cell, {"configuration": self.configuration}, resume=not overwrite)
        self._stale = of_bench(out) if out is not None and overwrite else []
        if out is None or overwrite:
            return
        for file, found in ((out, _of_result(out)), (path, _configuration(self.header))):
            if found is not None and found != self.configuration:
                raise ArtefactError(
                    f"{file} is {_difference(found, self.configuration)}; choose another file or pass --overwrite"
                )

    def begin(self) -> None:
        """Creates the file, once: a folder that cannot be written is found before the first minute of work.

        What is there and is not to count any more goes now, when all that can be wrong with the request was found.

        Raises:
            ArtefactError: it cannot be written.
        """
        remove(self._stale)
        self._stale = []
        super().begin()

    def add(self, key: str, cell: Mapping[str, Any]) -> None:
        """Files a cell, numbers that are not finite as null.

        Raises:
            ArtefactError: its line cannot be written.
        """
        self.append({"key": key, "cell": finite_json(dict(cell))})


def _cell(line: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    if not isinstance(line["key"], str) or not isinstance(line["cell"], dict):
        raise TypeError("no cell")
    return {line["key"]: line["cell"]}


def _of_result(out: Path) -> dict[str, Any] | None:
    if not out.exists():
        return None
    data = read_json(out, "benchmark")
    return _configuration(data if isinstance(data, dict) else {})


def _configuration(data: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Returns the configuration that a result or a first line names, `{}` where it names none; None of none."""
    found = None if data is None else data.get("configuration")
    return found if data is None or isinstance(found, dict) else {}


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
