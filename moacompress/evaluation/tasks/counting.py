"""Common words and frequent codes: what comes up most often in a long list.

How many there are, and how often each, are RULER's numbers (arXiv 2404.06654); the sentences are an argument. Common words
are drawn from a list of our own and then from pairs of words, where RULER uses the word lists of the wonderwords package.
Every prompt is shuffled in its own way, where RULER shuffles all alike.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moacompress.core.errors import DataError
from moacompress.evaluation.tasks.drafts import Answer, PromptDraft
from moacompress.evaluation.tasks.task import PromptRequest
from moacompress.evaluation.tasks.vocabulary import WORDS
from moacompress.prompts.pools import KEYS_PER_SPLIT, draw_keys

COMMON_WORDS = 10
SHORT = 4096
"""Below so many tokens the common words and the others are repeated less often."""

ALPHA = 2.0
LETTERS = 6
TOKENS_PER_CODE = 50
FEWEST = 60
"""With so many words drawn the three most frequent ones have different counts."""
DOTS = "..."


@dataclass(frozen=True)
class CountingSentences:
    """The sentences of a question about how often words come up.

    Attributes:
        prompt: what the user says, with `{context}`.
        answer: how the answer begins.
    """

    prompt: str
    answer: str


COMMON = CountingSentences(
    "Ten words of this numbered list come up far more often than all others.\n{context}\nWhich ten words are they?",
    "\nThe ten words are:",
)
FREQUENT = CountingSentences(
    "This text is made of invented words and of dots.\n{context}\nLeaving out the dots, which three words come up most "
    "often? Name them and say nothing else.",
    "\nThe three words are:",
)


def make_common(request: PromptRequest, sentences: CountingSentences) -> PromptDraft:
    """Returns a prompt with a solved example, in a turn of its own, and the list whose ten common words are asked for.

    Raises:
        DataError: the length is too short.
    """
    short = request.length < SHORT
    often, seldom = (6, 1) if short else (30, 3)
    size, example_often, example_seldom = (20, 3, 1) if short else (40, 10, 3)
    rng = request.rng
    example = draw_words(rng, size)
    shown = _mix(example[:COMMON_WORDS], example[COMMON_WORDS:], example_often, example_seldom, rng)
    words = draw_words(rng, min(len(WORDS) + KEYS_PER_SPLIT, COMMON_WORDS + request.length))
    common, others = words[:COMMON_WORDS], words[COMMON_WORDS:]
    shuffled = request.fork()

    def ask(listed: Sequence[str]) -> str:
        return sentences.prompt.format(context=Answer.numbered(listed, "").text)

    said = ask(shown), sentences.answer.lstrip() + Answer.numbered(example[:COMMON_WORDS], "").text

    def write(count: int) -> PromptDraft:
        listed = _mix(common, others[:count], often, seldom, shuffled(count))
        ordered = sorted(common, key=listed.index)  # the model can but list them as they come up
        return PromptDraft((*said, ask(listed)), sentences.answer, Answer.numbered(ordered, ""), tuple(ordered))

    return request.fit(write, len(others))


def draw_words(rng: np.random.Generator, count: int) -> list[str]:
    """Returns `count` different words in random order; where the list has too few, pairs of words follow."""
    words = [WORDS[index] for index in rng.permutation(len(WORDS))[:count].tolist()]
    return words + draw_keys(rng, "evaluation", count - len(words))


def make_frequent(request: PromptRequest, sentences: CountingSentences) -> PromptDraft:
    """Returns a prompt of invented words whose frequencies follow a power law; the most frequent one is dots.

    Raises:
        DataError: the length is too short.
    """
    size = request.length // TOKENS_PER_CODE
    if size <= 3:
        raise DataError(
            f"task {request.task} takes at least {4 * TOKENS_PER_CODE} tokens; {request.length} were asked for"
        )
    codes = _draw_codes(request.rng, size)
    frequent, shuffled = tuple(codes[1:4]), request.fork()

    def write(count: int) -> PromptDraft:
        text = spread(codes, FEWEST + count)
        mixed = [text[i] for i in shuffled(count).permutation(len(text)).tolist()]
        user = sentences.prompt.format(context=" ".join(mixed))
        return PromptDraft((user,), sentences.answer, Answer.of(*frequent), frequent)

    return request.fit(write, request.length)


def spread(codes: Sequence[str], words: int) -> list[str]:
    """Returns every code, by rank, as often as the zeta distribution of exponent 2 has it among `words` draws."""
    zeta = math.pi**2 / 6
    return [code for rank, code in enumerate(codes, 1) for _ in range(int(words * rank**-ALPHA / zeta))]


def _draw_codes(rng: np.random.Generator, size: int) -> list[str]:
    codes: dict[str, None] = {DOTS: None}
    while len(codes) < size:
        codes["".join(rng.choice(list(string.ascii_lowercase), LETTERS).tolist())] = None
    return list(codes)


def _mix(common: Sequence[str], others: Sequence[str], often: int, seldom: int, rng: np.random.Generator) -> list[str]:
    words = [*common] * often + [*others] * seldom
    return [words[index] for index in rng.permutation(len(words)).tolist()]
