"""Questions over long documents: a question's own document among others, joined to an exact number of tokens.

Articles are dealt to calibration, validation and evaluation by the hash of their documents (`prompts.pools`). So neither a
question nor a document of one split is seen in another, and an article that is added moves no other. Where gates are trained,
about a fourth of calibration's articles is for them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moacompress.calibration.data.answers import SampleDraft
from moacompress.calibration.data.data_rows import ARTICLE, DataRow, field
from moacompress.core.errors import DataError
from moacompress.prompts.fitting import largest_fit
from moacompress.prompts.pools import CalibrationPart, Split, split_articles
from moacompress.prompts.sentences import DOCUMENTS
from moacompress.prompts.templates import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SLACK = 2
"""Tokens that a prompt may lack where no cut of its last document gives the exact number."""
_AROUND = 16
"""Characters around the first guess of a cut that are tried too."""
_JOINED = 3
"""Documents that the last, cut one is made of where what is left is too little for a document of its own."""


@dataclass(frozen=True)
class Library:
    """The documents and questions of one split.

    Attributes:
        documents: each once.
        articles: the article of each document.
        questions: text of each question, and the index of its document.
    """

    documents: tuple[str, ...]
    articles: tuple[int, ...]
    questions: tuple[tuple[str, int], ...]

    @staticmethod
    def of(rows: Sequence[DataRow], name: str, split: Split, part: CalibrationPart | None = None) -> Library:
        """Reads rows of `context` and `question`; of calibration's articles all, or those of a part.

        A row's article is the number that a SQuAD file gives it, or else that of its `title`, or of its `context`, in
        the order in which they come. A document of two articles belongs to the first.

        Raises:
            DataError: a row without text under its columns, or fewer than three articles, or than two for the parts.
        """
        articles: dict[str, int] = {}
        asked: dict[tuple[str, str], None] = {}
        for document, question, number in asked_documents(rows, name):
            articles.setdefault(document, number)
            asked.setdefault((question, document))
        found = split_articles(articles.items(), name, part)
        own = [(text, number) for text, (number, owner) in found.items() if owner == split]
        index_of = {text: index for index, (text, _) in enumerate(own)}
        return Library(
            tuple(text for text, _ in own),
            tuple(number for _, number in own),
            tuple((question, index_of[document]) for question, document in asked if document in index_of),
        )

    def distractors(self, document: int, rng: np.random.Generator) -> list[int]:
        """Returns all other documents in random order, those of the same article first."""
        others = [index for index in rng.permutation(len(self.documents)).tolist() if index != document]
        return sorted(others, key=lambda index: self.articles[index] != self.articles[document])


def asked_documents(rows: Sequence[DataRow], name: str) -> list[tuple[str, str, int]]:
    """Returns the document of each row, its question, and the number of its article.

    Raises:
        DataError: a row without text under its columns.
    """
    numbers: dict[str, int] = {}
    found = []
    for index in range(len(rows)):
        row = rows[index]
        document, question = (field(row, column, name, index).strip() for column in ("context", "question"))
        title, number = row.get("title"), row.get(ARTICLE)
        if not isinstance(number, int):
            mark = title if isinstance(title, str) and title.strip() else document
            number = numbers.setdefault(mark, len(numbers))
        found.append((document, question, number))
    return found


def joined_drafts(
    rows: Sequence[DataRow],
    name: str,
    wanted: dict[int, int],
    split: Split,
    seed: tuple[int, ...],
    tokenizer: PreTrainedTokenizerBase,
    answer_tokens: int,
    part: CalibrationPart | None = None,
    may_lack: bool = False,
) -> list[SampleDraft]:
    """Returns prompts of `length - answer_tokens` tokens exactly, each with a question of its own.

    A document is cut where the tokens come out right; where no cut does, because tokens merge, the prompt has up to
    `SLACK` tokens fewer. `wanted` is how many prompts of each length; of calibration's articles it takes all, or those of a
    part. If it `may_lack`, too few questions are no error.

    Raises:
        DataError: from `Library.of`; too few documents to fill a length, or too few questions whose document fits it.
    """
    library = Library.of(rows, name, split, part)
    left = np.random.default_rng(seed).permutation(len(library.questions)).tolist()
    drafts = []
    for length, count in wanted.items():
        chosen: list[int] = []
        for index in left:
            if len(chosen) == count:
                break
            ids = _join(library, index, length - answer_tokens, (*seed, length, index), tokenizer, f"{name} ({split})")
            if ids is not None:
                chosen.append(index)
                drafts.append(SampleDraft(ids, [False] * len(ids), answer_tokens, name, length))
        if len(chosen) < count and not may_lack:
            raise DataError(
                f"{name} has {len(chosen)} {split} questions left whose document fits a prompt of {length:,} tokens, of "
                f"{count} needed; give more questions or shorter documents, or ask for longer lengths"
            )
        left = [index for index in left if index not in chosen]
    return drafts


def _join(
    library: Library, index: int, target: int, seed: tuple[int, ...], tokenizer: PreTrainedTokenizerBase, what: str
) -> list[int] | None:
    """Returns the ids of one question's prompt, or None if its document leaves no room for another.

    Raises:
        DataError: all documents are too few.
    """
    rng = np.random.default_rng(seed)
    question, own = library.questions[index]
    others, depth = [library.documents[i] for i in library.distractors(own, rng)], float(rng.random())

    def encode(whole: int, part: str = "") -> list[int]:
        documents = [*others[:whole], part] if part else others[:whole]
        documents.insert(round(depth * len(documents)), library.documents[own])
        return encode_prompt(tokenizer, DOCUMENTS.render(documents, question), DOCUMENTS.answer)

    if len(encode(0)) >= target:
        return None
    whole = largest_fit(lambda count: len(encode(count)), target, len(others), what)
    if whole == len(others):
        raise DataError(
            f"the {len(library.documents)} documents of {what} fill {len(encode(whole)):,} tokens with the question; a prompt "
            f"of {target:,} was asked for: give more or longer documents, or shorter lengths"
        )

    def fill(whole: int) -> list[int]:
        part = " ".join(others[whole : whole + _JOINED])
        cut = exact_cut(lambda size: len(encode(whole, part[:size])), len(part), target)
        return encode(whole, part[:cut]) if cut else []

    ids = fill(whole)
    if len(ids) < target and whole:
        ids = max(ids, fill(whole - 1), key=len)
    return ids or None


def exact_cut(tokens: Callable[[int], int], most: int, target: int) -> int:
    """Returns the number of characters, 1 to `most`, with which a prompt has `target` tokens, or up to `SLACK` fewer.

    It is 0 if there is none. `tokens` gives the tokens with so many characters, more with more but for a few around a merge.
    """
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) <= target else (low, middle)
    best, missing = 0, SLACK + 1
    for size in sorted(range(max(low - _AROUND, 1), min(low + _AROUND, most) + 1), key=lambda size: abs(size - low)):
        lacks = target - tokens(size)
        if 0 <= lacks < missing:
            best, missing = size, lacks
        if not missing:
            break
    return best
