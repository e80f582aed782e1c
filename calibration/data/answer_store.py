"""Answers of the dense model on disk, so that a run that was stopped while it answered resumes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moacompress.core.records import Records


class AnswerStore:
    """A file with one line of JSON for every batch of answers: `{"answers": {key: [token ids]}}`.

    A batch is written as a whole before the next begins; what cannot be read is answered again.
    """

    def __init__(self, path: str | Path | None, weights: str, dtype: str) -> None:
        """Reads what is there.

        Args:
            path: the file, such as `profile/answers.jsonl`; it is made with the first batch. None keeps answers in memory.
            weights: fingerprint of the dense model's weights.
            dtype: what it computes in.

        Raises:
            ArtefactError: the file cannot be read.
        """
        self._records, self._model = Records(None if path is None else Path(path), _answers), f"{weights} {dtype}"

    def get(self, prompt: Sequence[int], room: int) -> list[int] | None:
        """Returns the answer to a prompt with room for so many tokens, or None if it is not known."""
        answer = self._records.get(self._key(prompt, room))
        return None if answer is None else list(answer)

    def add(self, prompts: Sequence[Sequence[int]], room: int, answers: Sequence[Sequence[int]]) -> None:
        """Writes the answers to a batch of prompts to the end of the file.

        Raises:
            ArtefactError: the file cannot be written; what was in it still is.
        """
        batch = {self._key(prompt, room): list(answer) for prompt, answer in zip(prompts, answers, strict=True)}
        self._records.append({"answers": batch})

    def _key(self, prompt: Sequence[int], room: int) -> str:
        digest = hashlib.sha256(f"{self._model} {room} ".encode())
        digest.update(np.asarray(prompt, "<i8").tobytes())
        return digest.hexdigest()[:32]


def _answers(line: Mapping[str, Any]) -> dict[str, list[int]]:
    batch = line["answers"]
    if not all(type(token) is int and token >= 0 for answer in batch.values() for token in answer):
        raise ValueError("no token ids")
    return dict(batch)
