"""Samples: checks, fingerprints, and files that come back as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moacompress.calibration.data.samples import (
    Sample,
    SampleKind,
    fingerprint_sample,
    fingerprint_samples,
    load_samples,
    save_samples,
)
from moacompress.core.errors import ArtefactError, DataError


def sample(
    n: int = 80,
    answer: int = 5,
    length: int = 100,
    seed: int = 0,
    source: str = "needle/noise",
    kind: SampleKind = "answer",
) -> Sample:
    mask = np.zeros(n, np.bool_)
    mask[n - answer :] = True
    return Sample(np.random.default_rng(seed).integers(0, 99, n), mask, source, length, kind)


def test_round_trip(tmp_path: Path) -> None:
    samples = [sample(), sample(100, 1, 100, 1, "file:ä.jsonl"), sample(65, 64, 4096, 2, kind="text")]
    save_samples(tmp_path / "s.safetensors", samples)
    loaded = load_samples(tmp_path / "s.safetensors")
    for before, after in zip(samples, loaded, strict=True):
        assert (before.input_ids == after.input_ids).all()
        assert after.input_ids.dtype == np.int64
        assert (before.answer_mask == after.answer_mask).all()
        assert after.answer_mask.dtype == np.bool_
        assert (before.source, before.length, before.kind) == (after.source, after.length, after.kind)
    save_samples(tmp_path / "none.safetensors", [])
    assert load_samples(tmp_path / "none.safetensors") == []


def rewrite(path: Path, **notes: str) -> None:
    """Changes what a file of samples notes beside its tensors."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    with safe_open(path, framework="numpy") as file:
        changed = {**file.metadata(), **notes}
    save_file(load_file(path), path, metadata=changed)


@pytest.mark.parametrize(
    ("note", "value"),
    [
        ("kinds", '["answer"]'),
        ("kinds", '["answer", "poem"]'),
        ("kinds", "["),
        ("sources", "3"),
        ("sources", '{"a": 1}'),
        ("sources", "[" * 100_000),
    ],
)
def test_notes_that_cannot_be(tmp_path: Path, note: str, value: str) -> None:
    path = tmp_path / "s.safetensors"
    save_samples(path, [sample(), sample()])
    rewrite(path, **{note: value})
    with pytest.raises(ArtefactError, match="make them from scratch"):
        load_samples(path)


def test_damaged_foreign_and_contradicting_files(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "s.safetensors"
    save_samples(path, [sample()])
    for damaged in (path.read_bytes()[:-40], b"hello"):
        path.write_bytes(damaged)
        with pytest.raises(ArtefactError, match=r"cannot read samples .*make them from scratch"):
            load_samples(path)
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(ArtefactError, match="not a file of samples"):
        load_samples(path)
    tensors = {name: np.zeros(3, np.int64) for name in ("input_ids", "answer_mask", "offsets", "lengths")}
    notes = {"format": "moacompress-samples", "version": "1", "sources": '["a", "b"]', "kinds": '["text", "text"]'}
    save_file(tensors, path, metadata=notes)
    with pytest.raises(ArtefactError, match="contradict"):
        load_samples(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((64, 5, 100), r"64 tokens; it must be longer than the largest sink, 64 tokens"),
        ((101, 5, 100), r"101 tokens, more than the 100"),
        ((80, 80, 100), "no answer tokens, or one without anything before"),
        ((80, 0, 100), "no answer tokens"),
    ],
)
def test_bad_samples(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        sample(*arguments)


def test_fingerprints() -> None:
    first, second = sample(seed=1), sample(seed=2)
    assert fingerprint_sample(first) == fingerprint_sample(sample(seed=1, answer=9, length=999, source="other"))
    assert fingerprint_sample(first) != fingerprint_sample(second)
    assert fingerprint_samples([first, second]) == fingerprint_samples([second, first])
    assert fingerprint_samples([first, second]) != fingerprint_samples([first])
    mask = np.arange(80) >= 75
    assert fingerprint_sample(Sample(np.arange(80), mask, "x", 80)) == "c8160ed519660b7b"  # as it ever was
