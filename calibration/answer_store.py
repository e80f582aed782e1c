"""Answers of the dense model on disk, so that a run that was stopped while it answered goes on from there."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moacompress.core.errors import ArtefactError

logger = logging.getLogger(__name__)


class AnswerStore:
    """A file with one line of JSON for every batch of answers: `{"answers": {key: [token ids]}}`.

    A batch is written and flushed as a whole before the next begins. Lines that cannot be read, such as a half one at
    the end, are left out; a file that cannot be read at all counts as empty.
    """

    def __init__(self, path: str | Path, weights: str, dtype: str) -> None:
        """Reads what is there.

        Args:
            path: the file, such as `profile/answers.jsonl`; it is made with the first batch.
            weights: fingerprint of the dense model's weights.
            dtype: what it computes in.
        """
        self._path, self._model = Path(path), f"{weights} {dtype}"
        self._answers, self._torn = _read(self._path)

    def get(self, prompt: Sequence[int], room: int) -> list[int] | None:
        """Returns the answer to a prompt with room for so many tokens, or None if it is not known."""
        answer = self._answers.get(self._key(prompt, room))
        return None if answer is None else list(answer)

    def add(self, prompts: Sequence[Sequence[int]], room: int, answers: Sequence[Sequence[int]]) -> None:
        """Writes the answers to a batch of prompts to the end of the file.

        Raises:
            ArtefactError: the file cannot be written; what was in it still is.
        """
        batch = {self._key(prompt, room): list(answer) for prompt, answer in zip(prompts, answers, strict=True)}
        line = ("\n" if self._torn else "") + json.dumps({"answers": batch}) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="ascii") as file:
                self._torn = True
                file.write(line)
            self._torn = False
        except OSError as error:
            raise ArtefactError(
                f"cannot write the dense model's answers to {self._path}: {error.strerror or error}; those written "
                "before are kept"
            ) from error
        self._answers |= batch

    def _key(self, prompt: Sequence[int], room: int) -> str:
        digest = hashlib.sha256(f"{self._model} {room} ".encode())
        digest.update(np.asarray(prompt, "<i8").tobytes())
        return digest.hexdigest()[:32]


def _read(path: Path) -> tuple[dict[str, list[int]], bool]:
    """Returns the answers in a file, and whether its last line lacks its end."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}, False
    except OSError as error:
        logger.warning("cannot read %s: %s; the dense model answers anew", path, error.strerror or error)
        return {}, False
    answers: dict[str, list[int]] = {}
    damaged = 0
    for line in data.split(b"\n"):
        if line.strip():
            batch = _batch(line)
            damaged += batch is None
            answers |= batch or {}
    if damaged:
        logger.warning("%s has %d damaged line(s); those answers are made anew", path, damaged)
    return answers, bool(data) and not data.endswith(b"\n")


def _batch(line: bytes) -> dict[str, list[int]] | None:
    try:
        batch: Any = json.loads(line.decode("ascii"))["answers"]
        sound = all(type(token) is int and token >= 0 for answer in batch.values() for token in answer)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return dict(batch) if sound else None
