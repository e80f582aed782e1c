"""Shingles: one form of a text, a bounded sample that estimates without bias, and files that cannot be trusted."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from moacompress.core import shingles
from moacompress.core.errors import ArtefactError, DataError
from moacompress.core.shingles import Shingles, normalised, overlap, refuse_overlap, shingle_hashes


def text(seed: int, words: int) -> str:
    drawn = random.Random(seed)
    return " ".join(f"w{drawn.randrange(10**6)}" for _ in range(words))


def test_copies_have_one_form() -> None:
    one = "The Straße was wide,\nand quiet."
    for copy in (
        "\ufeffThe Straße was wide, and quiet.",
        "the STRASSE\u00a0was  wide,\tand quiet. ",
        "The Straße was wide, and quiet.",
    ):
        assert normalised(copy) == normalised(one)
    assert normalised("café") == normalised("cafe\u0301")
    assert normalised("another") != normalised(one)


def test_a_shingle_is_thirteen_words() -> None:
    words = text(0, 40).split()
    assert len(shingle_hashes(" ".join(words))) == 28
    assert len(shingle_hashes(" ".join(words[:12]))) == 0
    changed = [*words[:20], "other", *words[21:]]
    assert Shingles.of([" ".join(words)]).share([" ".join(changed)]) == 15 / 28
    assert len(shingle_hashes("漢字" * 10)) == 8  # no spaces, so characters are words


def test_the_sample_is_bounded_and_its_share_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shingles, "MOST_HASHES", 4096)
    seen, new = text(1, 60_000), text(2, 60_000)
    sample = Shingles.of([seen])
    assert 1024 < len(sample.hashes) <= 4096
    assert sample.modulus == 16
    half = " ".join([*seen.split()[:20_000], *new.split()[:20_000]])
    found = sample.share([half])
    assert found is not None
    assert abs(found - 0.5) < 0.04  # 4 standard errors of 2,500 that are sampled
    assert sample.share([seen]) == 1.0
    assert sample.share([new]) == 0.0
    assert sample.share([text(3, 10)]) is None
    assert overlap(None, [seen]) is None


def test_a_union_is_the_sample_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shingles, "MOST_HASHES", 1000)
    texts = [text(seed, 1500) for seed in range(5)]
    whole = Shingles.of(texts)
    for parts in ([texts[:2], texts[2:]], [texts[3:], texts[:3]], [[each] for each in texts]):
        found = Shingles.union([Shingles.of(part) for part in parts])
        assert (found.modulus, found.hashes.tolist()) == (whole.modulus, whole.hashes.tolist())


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    sample = Shingles.of([text(0, 500)])
    sample.save(tmp_path / "a.shingles")
    again = Shingles.load(tmp_path / "a.shingles")
    assert (again.modulus, again.hashes.tolist()) == (sample.modulus, sample.hashes.tolist())
    again.save(tmp_path / "b.shingles")
    assert (tmp_path / "a.shingles").read_bytes() == (tmp_path / "b.shingles").read_bytes()


KNOWN = {"moacompress-shingles": "1 2"}


@pytest.mark.parametrize(
    ("hashes", "notes"),
    [
        (np.array([2, 4], np.uint64), {}),
        (np.array([2, 4], np.uint64), {"moacompress-shingles": "9 2"}),
        (np.array([3, 6], np.uint64), {"moacompress-shingles": "1 3"}),
        (np.array([2, 4], np.uint64), {"moacompress-shingles": "1 0"}),
        (np.array([2, 4], np.uint64), {"moacompress-shingles": f"1 {2**99}"}),
        (np.array([2, 4], np.uint64), {"moacompress-shingles": "1 two"}),
        (np.array([2, 3], np.uint64), KNOWN),
        (np.array([4, 2], np.uint64), KNOWN),
        (np.array([2, 2], np.uint64), KNOWN),
        (np.array([2, 4], np.float32), KNOWN),
        (np.array([[2, 4]], np.uint64), KNOWN),
        (np.arange(1, shingles.MOST_HASHES + 1000).astype(np.uint64) * np.uint64(2), KNOWN),
        (None, {}),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused(
    tmp_path: Path, hashes: np.ndarray | None, notes: dict[str, str]
) -> None:
    path = tmp_path / "a.shingles"
    path.write_bytes(b"\x80\x04pickle" if hashes is None else save({"hashes": hashes}, metadata=notes))
    with pytest.raises(ArtefactError, match=r"cannot read the shingles of calibration in .*remove it"):
        Shingles.load(path)


def test_one_percent_is_the_limit() -> None:
    for share in (None, 0.0, 0.01):
        refuse_overlap(share, "prose/a.txt")
    with pytest.raises(
        DataError, match=r"1\.1% of the runs of 13 words in prose/a\.txt .*more than 1%.*--allow-overlap"
    ):
        refuse_overlap(0.011, "prose/a.txt")
