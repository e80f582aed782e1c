"""Disjoint pools of keys, values and haystacks for calibration, validation and evaluation.

What a plan is measured on must never have been profiled, so the split is built into how things are drawn: keys by their
noun's index mod 3, numbers and codes by a residue mod 3, text by a hash of its normal form (`core.shingles`). Evaluation has
adjectives of its own too, as it has sentences and noise of its own (`sentences`).

Text is dealt by what it says, not by where it stands: a new file moves no other, and a copy goes where the original is. Of 30
documents or more each belongs to one pool. Fewer are dealt in sections of 500 words, counted from the document's beginning,
with 13 words cut off where another section follows, so that no shingle of 13 words is in two pools; what a pool has of a
document is joined again. Where the hash leaves a pool empty, as it may with few sections, the fullest pool gives it the
section of the smallest hash; a text with fewer different sections than pools is refused.
"""

from __future__ import annotations

import re
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np

from moacompress.core.errors import DataError
from moacompress.core.loaded_rows import file_rows, read_once
from moacompress.core.shingles import SHINGLE_WORDS, WORD, normalised, text_hash

Split = Literal["calibration", "validation", "evaluation"]
SPLITS: tuple[Split, ...] = get_args(Split)
CalibrationPart = Literal["profile", "gates"]
"""Of calibration's texts, where there are gates: rules are priced on the one part, gates are trained on the other."""
OF_SPLITS: dict[Split, int] = dict.fromkeys(SPLITS, 1)
"""Shares of the pools: a third each."""
OF_PARTS: dict[CalibrationPart, int] = {"profile": 3, "gates": 1}
SECTION_WORDS = 500
WHOLE_DOCUMENTS = 30
"""With so many documents none is cut into sections."""

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
_OF_EVALUATION = """
abrupt agile ample azure balmy bashed blithe blunt bouncy brittle bulky candid casual chilly chubby compact cordial
crisp damp dapper dense downy drowsy dutiful exact fickle fluffy fond frank frosty frugal genial gifted glad gleaming
glossy grumpy hardy hasty hearty hefty hidden hushed inland joyful knotty leafy lean limber linear lofty lunar marine
meek merry muted neat nifty nippy oval peppy placid plucky plump poised pristine prudent pungent quaint radiant robust
rosy rowdy rugged russet scenic serene sheer sleek slender slim snug sober spotted spry stately stern stout supple
tawny thorny thrifty timid tranquil upbeat upright velvety verdant wary whimsical wispy wiry woolly zany zesty
"""
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())
EVALUATION_ADJECTIVES = tuple(_OF_EVALUATION.split())
"""As many as `ADJECTIVES`."""

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
    adjectives = EVALUATION_ADJECTIVES if split == "evaluation" else ADJECTIVES
    nouns = NOUNS[SPLITS.index(split) :: len(SPLITS)]
    picks = rng.choice(len(adjectives) * len(nouns), size=count, replace=False)
    return [f"{adjectives[pick // len(nouns)]}-{nouns[pick % len(nouns)]}" for pick in picks.tolist()]


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
        pools: for each split its documents, or what it has of them; a document is a tuple of words.
        files: for each split the files that its documents are from, in the same order.
    """

    name: str
    pools: dict[Split, tuple[tuple[str, ...], ...]]
    files: dict[Split, tuple[Path, ...]] = field(default_factory=dict)

    @staticmethod
    def load(path: str | Path, part: CalibrationPart | None = None) -> Prose:
        """Reads a `.txt` file or a folder of them; of calibration's text all, or a part.

        Raises:
            DataError: missing, unreadable, or without text, or too little for all pools.
        """
        read = read_files(Path(path))
        files, texts = list(read), list(read.values())
        found = {split: pool_of(texts, split, str(path), part if split == "calibration" else None) for split in SPLITS}
        return Prose(
            str(path),
            {split: tuple(tuple(text.split()) for text in pool.values()) for split, pool in found.items()},
            {split: tuple(files[number] for number in pool) for split, pool in found.items()},
        )

    def words(self, rng: np.random.Generator, split: Split) -> list[str]:
        """Returns every word of the pool once, from the beginning of a random sentence on, wrapping around."""
        documents = self.pools[split]
        first = int(rng.integers(len(documents)))
        words = [word for document in (*documents[first:], *documents[:first]) for word in document]
        starts = [0, *sentence_ends(words[: len(documents[first])])[:-1]]
        start = starts[int(rng.integers(len(starts)))]
        return words[start:] + words[:start]


Pool = TypeVar("Pool")


def deal(keys: Sequence[int], shares: Mapping[Pool, int], name: str, unit: str = "texts") -> list[Pool]:
    """Returns the pool that each of some hashes belongs to, whatever others there are but where a pool would be empty.

    Equal hashes go to one pool. Pools have shares in whole parts; `name` and `unit` say in the message what the hashes are of.

    Raises:
        DataError: fewer different ones than pools.
    """
    table = [pool for pool, share in shares.items() for _ in range(share)]
    found = {key: table[key % len(table)] for key in keys}
    if len(found) < len(shares):
        raise DataError(
            f"{name} has too few distinct {unit}: {len(found)}; {', '.join(map(str, shares))} need at least one each, "
            "better dozens: give more or longer text"
        )
    for pool in shares:
        if pool not in found.values():
            sizes = Counter(found.values())
            fullest = max(shares, key=lambda each: sizes[each])
            found[min(key for key, at in found.items() if at == fullest)] = pool
    return [found[key] for key in keys]


def pool_of(documents: Sequence[str], split: Split, name: str, part: CalibrationPart | None = None) -> dict[int, str]:
    """Returns what a split, or a part of it, has of some documents of a source, by their index; see the module.

    Raises:
        DataError: too little text for all splits, or for the parts.
    """
    whole = len(documents) >= WHOLE_DOCUMENTS
    pieces = [(number, text) for number, text in enumerate(documents)]
    unit = "documents"
    if not whole:
        pieces = [(number, section) for number, text in pieces for section in sections(text)]
        unit = f"sections of {SECTION_WORDS} words"
    keys = [text_hash(text) for _, text in pieces]
    mine = [at for at, pool in enumerate(deal(keys, OF_SPLITS, name, unit)) if pool == split]
    if part is not None:
        parts = deal([keys[at] for at in mine], OF_PARTS, f"the {split} part of {name}", unit)
        mine = [at for at, owner in zip(mine, parts, strict=True) if owner == part]
    found: dict[int, list[str]] = {}
    for at in mine:
        number, text = pieces[at]
        found.setdefault(number, []).append(text)
    return {number: "\n\n".join(texts) for number, texts in found.items()}


def sections(text: str) -> list[str]:
    """Returns the sections of a text: 500 words each, without the last 13 where another one follows.

    A rest of 13 words or fewer belongs to the last section.
    """
    begins = [word.start() for word in WORD.finditer(text)]
    starts = [
        first for first in range(0, len(begins), SECTION_WORDS) if not first or len(begins) - first > SHINGLE_WORDS
    ]
    found = []
    for first in starts:
        end = first + SECTION_WORDS - SHINGLE_WORDS if first != starts[-1] else len(begins)
        found.append(text[begins[first] : begins[end] if end < len(begins) else len(text)].rstrip())
    return found


def split_articles(
    documents: Iterable[tuple[str, int]], name: str, part: CalibrationPart | None = None
) -> dict[str, tuple[int, Split | None]]:
    """Returns the article and the split of documents, all those of one article being in one split.

    An article goes by the smallest hash of its documents; a document of two articles belongs to the first. Documents come with
    the number of their article, some more than once. With a part of calibration's articles the others are in no split.

    Raises:
        DataError: fewer than three articles, or too few for the parts.
    """
    owner: dict[int, int] = {}
    pairs = [(text, text_hash(text), number) for text, number in documents]
    for _, key, number in pairs:
        owner.setdefault(key, number)
    keys: dict[int, int] = {}
    for key, number in owner.items():
        keys[number] = min(key, keys.get(number, key))
    unit = "documents or articles with questions"
    dealt = deal(list(keys.values()), OF_SPLITS, name, unit)
    splits: dict[int, Split | None] = {**dict(zip(keys, dealt, strict=True))}
    if part is not None:
        mine = [number for number, split in splits.items() if split == "calibration"]
        parts = deal([keys[number] for number in mine], OF_PARTS, f"the calibration part of {name}", unit)
        splits |= {number: None for number, held in zip(mine, parts, strict=True) if held != part}
    return {text: (owner[key], splits[owner[key]]) for text, key, _ in pairs}


def sentence_ends(words: Sequence[str]) -> list[int]:
    """Returns the indices right after every word that ends a sentence; the end of the text counts."""
    ends = [index + 1 for index, word in enumerate(words) if re.search(r"[.!?][\"')\]]*$", word)]
    return ends if ends and ends[-1] == len(words) else [*ends, len(words)]


@read_once
def read_files(path: Path) -> dict[Path, str]:
    """Returns the texts of a `.txt` file or of the `.txt` files in a folder, by name, without blank ones and repeats.

    Texts that are the same in their normal form (`core.shingles`) are repeats.

    Raises:
        DataError: missing, unreadable, or without text.
    """
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} has no .txt files; give a .txt file or a folder with some")
    texts: dict[str, tuple[Path, str]] = {}
    for file in files:
        if file != path and not file.is_file():  # a pipe would be waited for, and a device has no end
            raise DataError(f"cannot read {file}: it is no file")
        for row in file_rows("text", file):
            texts.setdefault(normalised(row["text"]), (file, row["text"]))
    texts.pop("", None)
    if not texts:
        raise DataError(f"{path} has no text in its {len(files)} .txt file(s)")
    return dict(texts.values())
