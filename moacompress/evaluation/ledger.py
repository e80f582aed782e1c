"""The ledger of scores: one JSON line for every model and prompt, so that a run that was stopped goes on where it was.

A score is filed under a hash of everything it depends on, so lines of another plan or other prompts are never mistaken.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moacompress.artefacts import canonical_json
from moacompress.errors import ArtefactError
from moacompress.evaluation.scoring import Score


class Ledger:
    """Scores in memory and, if a path is given, on disk.

    Args:
        path: the JSON lines file, or None.

    Raises:
        ArtefactError: the file can not be read.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._scores: dict[str, Score] = {}
        if path is None or not path.exists():
            return
        try:
            lines = path.read_text("utf-8", errors="replace").split("\n")
        except OSError as error:
            raise ArtefactError(f"can not read {path}: {error.strerror or error}") from error
        for line in lines:
            parsed = _parse(line)
            if parsed is not None:
                self._scores[parsed[0]] = parsed[1]

    def get(self, key: str) -> Score | None:
        """Returns the score filed under `key`, or None."""
        return self._scores.get(key)

    def add(self, key: str, score: Score, **notes: Any) -> None:
        """Files a score and writes its line; `notes` are for a human reader.

        Raises:
            ArtefactError: the line can not be written.
        """
        self._scores[key] = score
        if self._path is None:
            return
        line = canonical_json({"key": key, "hit": score.hit, "nll": score.nll, **notes})
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                # the line break comes first as well: what a kill left half-written must not swallow this line
                file.write(f"\n{line}\n")
        except OSError as error:
            raise ArtefactError(f"can not write {self._path}: {error.strerror or error}") from error


def _parse(line: str) -> tuple[str, Score] | None:
    """Reads a line; None for one that was cut off."""
    try:
        data = json.loads(line)
        return str(data["key"]), Score(bool(data["hit"]), float(data["nll"]))
    except (ValueError, KeyError, TypeError):
        return None
