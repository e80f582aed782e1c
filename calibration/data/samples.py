"""Samples: token ids with a mask of the answer tokens, what the profile runs on and plans are measured on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Json, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from moacompress.core.errors import ArtefactError, DataError
from moacompress.core.files import write_bytes
from moacompress.rules.rule import SINKS

FORMAT = "moacompress-samples"
SampleKind = Literal["answer", "text"]
"""What the targets of a sample are: tokens of an answer, or positions of plain text."""
SHORTEST = max(SINKS)
"""A sample of this many tokens or fewer is all sink: no rule can be told from another on it."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A prompt and its answer.

    Attributes:
        input_ids: int64 `[n]`, `n <= length`: prompt and answer.
        answer_mask: bool `[n]`, True at answer tokens. The logits that predict token t are at t - 1; `answer_mask[0]`
            is False.
        source: where it came from, such as `needle/noise` or `file:qa.jsonl`.
        length: the nominal length that it was made for, tokens.
        kind: see `SampleKind`.
    """

    input_ids: npt.NDArray[np.int64]
    answer_mask: npt.NDArray[np.bool_]
    source: str
    length: int
    kind: SampleKind = "answer"

    def __post_init__(self) -> None:
        n = len(self.input_ids)
        if self.input_ids.shape != (n,) or self.answer_mask.shape != (n,):
            raise DataError(
                f"a sample of {self.source} has shapes {self.input_ids.shape} and {self.answer_mask.shape}; both must "
                "be [n]"
            )
        if n > self.length:
            raise DataError(
                f"a sample of {self.source} has {n:,} tokens, more than the {self.length:,} it was made for"
            )
        if n <= SHORTEST:
            raise DataError(
                f"a sample of {self.source} has {n} tokens; it must be longer than the largest sink, {SHORTEST} "
                "tokens, to say anything about windows; ask for longer lengths"
            )
        if self.answer_mask[0] or not self.answer_mask.any():
            raise DataError(f"a sample of {self.source} has no answer tokens, or one without anything before it")

    @property
    def target_rows(self) -> npt.NDArray[np.int64]:
        """Positions whose logits predict the targets, `[targets]`."""
        return np.flatnonzero(self.answer_mask) - 1


def fingerprint_sample(sample: Sample) -> str:
    """Returns a short hash (16 hex digits) of the token ids alone: equal texts get equal hashes."""
    return hashlib.sha256(np.ascontiguousarray(sample.input_ids, dtype="<i8").tobytes()).hexdigest()[:16]


def fingerprint_samples(samples: Iterable[Sample]) -> str:
    """Returns a short hash of a set of samples, whatever their order; used to refuse evaluation on calibration data."""
    return hashlib.sha256("".join(sorted(fingerprint_sample(sample) for sample in samples)).encode()).hexdigest()[:16]


def fingerprint_ordered(samples: Sequence[Sample]) -> str:
    """Returns a hash of all that the profile takes from samples: ids, answers and lengths, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{len(sample.input_ids)} {sample.length} ".encode())
        digest.update(np.ascontiguousarray(sample.input_ids, "<i8").tobytes())
        digest.update(np.ascontiguousarray(sample.answer_mask, np.uint8).tobytes())
    return digest.hexdigest()[:16]


def save_samples(path: str | Path, samples: Sequence[Sample]) -> None:
    """Writes samples to one safetensors file, atomically: ids and masks end to end, with the offsets of each sample.

    Raises:
        ArtefactError: the file cannot be written.
    """
    sizes = [len(sample.input_ids) for sample in samples]
    empty_ids, empty_mask = np.zeros(0, np.int64), np.zeros(0, np.bool_)
    tensors = {
        "input_ids": np.concatenate([empty_ids, *(sample.input_ids for sample in samples)]),
        "answer_mask": np.concatenate([empty_mask, *(sample.answer_mask for sample in samples)]).astype(np.uint8),
        "offsets": np.cumsum([0, *sizes], dtype=np.int64),
        "lengths": np.array([sample.length for sample in samples], np.int64),
    }
    notes = {
        "format": FORMAT,
        "version": "1",
        "sources": json.dumps([sample.source for sample in samples]),
        "kinds": json.dumps([sample.kind for sample in samples]),
    }
    write_bytes(Path(path), save(tensors, metadata=notes))


class SampleNotes(BaseModel):
    """What a file of samples notes beside its tensors, a source and a kind of every sample."""

    sources: Json[list[str]]
    kinds: Json[list[SampleKind]]


def load_samples(path: str | Path) -> list[Sample]:
    """Reads what `save_samples` wrote.

    Raises:
        ArtefactError: missing, not such a file, or inconsistent.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            notes = file.metadata() or {}
            if notes.get("format") != FORMAT or notes.get("version") != "1":
                raise ArtefactError(f"{path} is not a file of samples that this moacompress reads")
            ids, mask, offsets, lengths = (
                file.get_tensor(name) for name in ("input_ids", "answer_mask", "offsets", "lengths")
            )
            noted = SampleNotes.model_validate(notes)
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        why = f"its notes: {error.errors()[0]['msg']}" if isinstance(error, ValidationError) else error
        raise ArtefactError(f"cannot read samples {path}: {why}; make them from scratch") from error
    consistent = (
        all(array.ndim == 1 for array in (ids, mask, offsets, lengths))
        and all(array.dtype == np.int64 for array in (ids, offsets, lengths))
        and len(offsets) == len(lengths) + 1 == len(noted.sources) + 1 == len(noted.kinds) + 1
        and len(ids) == len(mask)
        and (np.diff(offsets) >= 0).all()
        and (offsets[0], offsets[-1]) == (0, len(ids))
    )
    if not consistent:
        raise ArtefactError(
            f"samples {path} contradict themselves: {len(ids)} ids, {len(mask)} in the mask; make them from scratch"
        )
    try:
        return [
            Sample(ids[a:b].astype(np.int64), mask[a:b].astype(np.bool_), source, int(length), kind)
            for a, b, source, length, kind in zip(
                offsets[:-1], offsets[1:], noted.sources, lengths, noted.kinds, strict=True
            )
        ]
    except DataError as error:
        raise ArtefactError(f"samples {path} are damaged: {error}; make them from scratch") from error
