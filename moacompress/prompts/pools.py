"""Disjoint pools of keys, values and haystacks for calibration, validation and evaluation.

What a plan is measured on must never have been profiled, so the split is built into how things are drawn: keys by their
noun's index mod 3, numbers and codes by a residue mod 3, prose by document (or by part of a document). The noise haystack is
one line in every split (`sentences.NOISE`): it holds nothing to learn.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np

from moacompress.core.errors import DataError

Split = Literal["calibration", "validation", "evaluation"]
SPLITS: tuple[Split, ...] = get_args(Split)
CalibrationPart = Literal["profile", "gates"]
"""Of calibration's texts, where there are gates: rules are priced on the one part, gates are trained on the other."""
_GATES_EVERY = 4
"""One document in so many is for gates."""

_ADJECTIVES = """
able amber ancient arctic autumn bashful bitter bold brave brief bright brisk broad bronze calm careful charming
clever coastal cosmic crimson curious daring distant dusty eager early earnest elegant faint famous fancy fertile
fierce flat formal frozen gentle giant golden graceful grand happy hollow honest humble icy idle jolly keen kind late
lazy light lively lonely loud loyal lucky mellow mighty misty modern narrow nimble noble odd olive patient plain
playful polite proud quick quiet rapid rare rough royal rustic salty scarlet secret shy silent silver simple sleepy
smooth solid steady stormy strange sturdy subtle sunny swift tame tender tidy tiny vivid warm wild wise
"""
_NOUNS = """
anchor apple arrow badge barn basket beacon bell bicycle blanket bottle bridge bucket button cabin camel candle canyon
carpet castle chimney circus clock cloud comet copper cottage crayon curtain desert diamond dolphin donkey dragon drum
eagle engine falcon feather ferry fiddle forest fountain galaxy garden glacier goose guitar hammer harbor hazel helmet
hotel island jacket jungle kettle kitten ladder lagoon lantern lemon lighthouse lizard magnet maple market meadow
mirror mountain museum needle oasis orchard otter oyster paddle palace panther parrot pebble pencil pepper pillow
planet pocket prairie puzzle rabbit raven ribbon river rocket saddle sailor shadow spider squirrel station sunset
temple thunder tiger timber tractor tunnel turtle valley velvet violin volcano wagon walnut whale window winter wizard
"""
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())

CODE_FORMS = (
    "A9A9A9",
    "aa99a9a",
    "9A9/A9A9",
    "aAa99Aa9",
    "99aa99aa",
    "A99.a99A",
    "AAA9_99aa",
    "a9-99A-9a",
    "9aa9:A9a",
    "A9AA99A",
)
"""Forms of codes: `A` stands for a capital, `a` for a small letter, `9` for a digit."""
_CLASSES = {"A": "ABCDEFGHJKLMNPQRSTUVWXYZ", "a": "abcdefghijkmnpqrstuvwxyz", "9": "0123456789"}

KEYS_PER_SPLIT = len(ADJECTIVES) * (len(NOUNS) // len(SPLITS))
"""Word keys that every split has at least."""


def draw_keys(rng: np.random.Generator, split: Split, count: int) -> list[str]:
    """Returns `count` different word keys such as `bold-lantern`; the nouns of two splits never meet."""
    nouns = NOUNS[SPLITS.index(split) :: len(SPLITS)]
    picks = rng.choice(len(ADJECTIVES) * len(nouns), size=count, replace=False)
    return [f"{ADJECTIVES[pick // len(nouns)]}-{nouns[pick % len(nouns)]}" for pick in picks.tolist()]


def draw_numbers(rng: np.random.Generator, split: Split, count: int) -> list[str]:
    """Returns `count` different 7-digit numbers whose residue mod 3 is the split's."""
    residue, step = SPLITS.index(split), len(SPLITS)
    first = 10**6 + (residue - 10**6) % step
    size = (10**7 - 1 - first) // step + 1
    numbers: dict[int, None] = {}
    while len(numbers) < count:
        numbers.setdefault(first + step * int(rng.integers(size)))
    return [str(number) for number in numbers]


def draw_uuids(rng: np.random.Generator, split: Split, count: int) -> list[str]:
    """Returns `count` random UUIDs (version 4) whose residue mod 3 is the split's."""
    found: dict[str, None] = {}
    while len(found) < count:
        drawn = uuid.UUID(bytes=rng.bytes(16), version=4)
        if drawn.int % len(SPLITS) == SPLITS.index(split):
            found[str(drawn)] = None
    return list(found)


def draw_codes(rng: np.random.Generator, split: Split, count: int) -> list[str]:
    """Returns `count` different codes of letters and digits, of many forms, whose characters add up to the split's residue.

    None has the form of two letters, a hyphen and four digits.
    """
    found: dict[str, None] = {}
    while len(found) < count:
        form = CODE_FORMS[int(rng.integers(len(CODE_FORMS)))]
        code = "".join(
            _CLASSES[mark][int(rng.integers(len(_CLASSES[mark])))] if mark in _CLASSES else mark for mark in form
        )
        if sum(code.encode()) % len(SPLITS) == SPLITS.index(split):
            found[code] = None
    return list(found)


@dataclass(frozen=True)
class Prose:
    """Long text as a haystack, split into pools.

    Attributes:
        name: file or folder it came from, for messages.
        pools: for each split its documents; a document is a tuple of words. Of three documents or more, each
            belongs to one split; fewer are each cut into three contiguous parts.
    """

    name: str
    pools: dict[Split, tuple[tuple[str, ...], ...]]

    @staticmethod
    def load(path: str | Path) -> Prose:
        """Reads a `.txt` file or a folder of them.

        Raises:
            DataError: missing, unreadable, or without text.
        """
        texts = read_documents(path)
        pools = {split: tuple(tuple(text.split()) for text in pool_of(texts, split)) for split in SPLITS}
        return Prose(str(path), pools)

    def of_part(self, part: CalibrationPart) -> Prose:
        """Returns the same text with a part of calibration's pool in its place."""
        return replace(self, pools={**self.pools, "calibration": tuple(texts_of_part(self.pools["calibration"], part))})

    def words(self, rng: np.random.Generator, split: Split) -> list[str]:
        """Returns every word of the pool once, from the beginning of a random sentence on, wrapping around."""
        documents = self.pools[split]
        first = int(rng.integers(len(documents)))
        words = [word for document in (*documents[first:], *documents[:first]) for word in document]
        starts = [0, *sentence_ends(words[: len(documents[first])])[:-1]]
        start = starts[int(rng.integers(len(starts)))]
        return words[start:] + words[:start]


def pool_of(documents: Sequence[str], split: Split) -> list[str]:
    """Returns a split's documents; of fewer than there are splits, its part of the words of each."""
    index, parts = SPLITS.index(split), len(SPLITS)
    if len(documents) >= parts:
        return list(documents[index::parts])
    found = []
    for text in documents:
        begins = [*(word.start() for word in re.finditer(r"\S+", text)), len(text)]
        words = len(begins) - 1
        found.append(text[begins[words * index // parts] : begins[words * (index + 1) // parts]])
    return found


_Text = TypeVar("_Text", str, tuple[str, ...])


def texts_of_part(texts: Sequence[_Text], part: CalibrationPart) -> list[_Text]:
    """Returns a part's texts, as strings or as tuples of words: every fourth is for gates; of a single one the last quarter."""
    if len(texts) > 1:
        return [texts[number] for number in numbers_of_part(len(texts), part)]
    cuts = [len(text) * (_GATES_EVERY - 1) // _GATES_EVERY for text in texts]
    return [text[cut:] if part == "gates" else text[:cut] for text, cut in zip(texts, cuts, strict=True)]


def numbers_of_part(count: int, part: CalibrationPart) -> list[int]:
    """Returns the indices that a part has of `count` documents: every fourth is for gates, and of fewer the last."""
    every = min(count, _GATES_EVERY)
    return [number for number in range(count) if (number % every == every - 1) == (part == "gates")]


def sentence_ends(words: Sequence[str]) -> list[int]:
    """Returns the indices right after every word that ends a sentence; the end of the text counts."""
    ends = [index + 1 for index, word in enumerate(words) if re.search(r"[.!?][\"')\]]*$", word)]
    return ends if ends and ends[-1] == len(words) else [*ends, len(words)]


def read_documents(path: str | Path) -> list[str]:
    """Returns the texts of a `.txt` file or of the `.txt` files in a folder, by name, without blank ones and repeats.

    Raises:
        DataError: missing, unreadable, or without text.
    """
    path = Path(path)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} has no .txt files; give a .txt file or a folder with some")
    texts = []
    for file in files:
        try:
            texts.append(file.read_text("utf-8"))
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 text: byte {error.start} is invalid; convert it first") from error
    texts = [text for text in dict.fromkeys(texts) if text.strip()]  # two of one text would be in different splits
    if not texts:
        raise DataError(f"{path} has no text in its {len(files)} .txt file(s)")
    return texts
