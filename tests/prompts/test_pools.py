"""Text is dealt to pools by what it says: whatever a folder has beside it, no pool sees another's text."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from moacompress.core.errors import DataError
from moacompress.core.shingles import shingle_hashes
from moacompress.prompts.pools import (
    ADJECTIVES,
    EVALUATION_ADJECTIVES,
    OF_PARTS,
    OF_SPLITS,
    SPLITS,
    Prose,
    Split,
    deal,
    pool_of,
    sections,
)


def text(seed: int, words: int) -> str:
    drawn = random.Random(seed)
    return " ".join(f"w{drawn.randrange(10**6)}" for _ in range(words))


def pools(documents: list[str]) -> dict[Split, Mapping[int, str]]:
    return {split: pool_of(documents, split, "texts") for split in SPLITS}


def hashes(texts: Mapping[int, str] | str) -> set[int]:
    parts = [texts] if isinstance(texts, str) else texts.values()
    return {int(number) for part in parts for number in shingle_hashes(part)}


@pytest.mark.parametrize("documents", [6, 40])
def test_a_new_document_moves_no_other(documents: int) -> None:
    given = [text(seed, 2500) for seed in range(documents)]
    before = pools(given)
    after = pools([text(99, 2500), *given])
    for split in SPLITS:
        held = {number - 1: part for number, part in after[split].items() if number}
        assert held == before[split]


@pytest.mark.parametrize("documents", [1, 3, 29, 30])
def test_no_two_pools_share_a_shingle(documents: int) -> None:
    found = pools([text(seed, 9000 if documents == 1 else 1200) for seed in range(documents)])
    assert all(found.values())
    for one, other in itertools.combinations(SPLITS, 2):
        assert not hashes(found[one]) & hashes(found[other])


def test_a_file_of_a_folder_alone_gives_evaluation_what_the_folder_gave_it(tmp_path: Path) -> None:
    """What was reproduced: `eval --text prose/a.txt` after `profile --text prose/`."""
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(text(number, 9000))
    seen = hashes(" ".join(itertools.chain(*Prose.load(tmp_path).pools["calibration"])))
    for number in range(3):
        alone = Prose.load(tmp_path / f"{number}.txt").pools["evaluation"]
        assert not seen & hashes(" ".join(itertools.chain(*alone)))


def test_copies_are_read_once(tmp_path: Path) -> None:
    one = text(0, 4000)
    for number, copy in enumerate((one, f"{one} ", f"\ufeff{one}", one.upper(), one.replace(" ", "\n"), text(1, 4000))):
        (tmp_path / f"{number}.txt").write_text(copy, "utf-8")
    files = {name.name for names in Prose.load(tmp_path).files.values() for name in names}
    assert files == {"0.txt", "5.txt"}


def test_a_folder_of_others_with_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text(0, 4000))
    os.mkfifo(tmp_path / "b.txt")
    with pytest.raises(DataError, match=r"cannot read .*b\.txt: it is no file"):
        Prose.load(tmp_path)


def test_sections_leave_out_what_would_be_shared() -> None:
    words = [f"w{number}" for number in range(1300)]
    found = [section.split() for section in sections(" ".join(words))]
    assert found == [words[:487], words[500:987], words[1000:]]
    assert [len(section.split()) for section in sections(" ".join(words[:1010]))] == [487, 510]
    assert sections("one two") == ["one two"]


def test_no_pool_is_empty() -> None:
    assert deal([3, 6, 9, 12], OF_SPLITS, "texts") == ["validation", "evaluation", "calibration", "calibration"]
    assert deal([9, 3, 6], OF_SPLITS, "texts") == ["calibration", "validation", "evaluation"]
    assert deal([3, 3, 7, 8], OF_SPLITS, "texts") == ["calibration", "calibration", "validation", "evaluation"]
    assert deal([4, 8], OF_PARTS, "texts") == ["gates", "profile"]
    for seed in range(40):
        found = pools([text(seed, 1500)])
        assert all(len(part[0].split()) > 400 for part in found.values())


@pytest.mark.parametrize("given", [text(0, 1000), "The same again and again. " * 1000, "word"])
def test_too_little_text_is_one_clear_error(given: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(given)
    with pytest.raises(
        DataError, match=r"a\.txt has too few distinct sections of 500 words: \d; calibration, .*longer text"
    ):
        Prose.load(tmp_path / "a.txt")


def test_gates_have_text_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(f"w{number}" for number in range(40_000)))
    whole = Prose.load(tmp_path).pools
    parts = {part: Prose.load(tmp_path, part).pools for part in OF_PARTS}
    found = {part: set(itertools.chain(*given["calibration"])) for part, given in parts.items()}
    assert not found["profile"] & found["gates"]
    assert found["profile"] | found["gates"] == set(itertools.chain(*whole["calibration"]))
    assert len(found["profile"]) > len(found["gates"])
    assert all(given["evaluation"] == whole["evaluation"] for given in parts.values())


def test_evaluation_has_adjectives_of_its_own() -> None:
    assert len(set(EVALUATION_ADJECTIVES)) == len(set(ADJECTIVES)) == len(ADJECTIVES)
    assert not set(EVALUATION_ADJECTIVES) & set(ADJECTIVES)
