"""Variable tracking: one chain of assignments in noise, all of whose variables are asked for.

Hops, lengths of names and the solved example, with shorter names and ten lines of noise, are RULER's (arXiv 2404.06654); it
fits the example to 500 tokens, which are ten lines for common tokenizers. The sentences are an argument.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moacompress.evaluation.tasks.drafts import Answer, PromptDraft
from moacompress.evaluation.tasks.task import PromptRequest
from moacompress.prompts.sentences import EVALUATION_NOISE

HOPS = 4
LETTERS, EXAMPLE_LETTERS = 5, 3
EXAMPLE_LINES = 10


@dataclass(frozen=True)
class TrackingSentences:
    """The sentences of variable tracking.

    Attributes:
        prompt: what the user says, with `{context}` and `{value}`.
        answer: how the answer begins, with `{value}` and `{count}`, the number of variables.
        first: assigns `{value}` to `{name}`.
        then: assigns what `{other}` has to `{name}`.
        noise: one line of the haystack.
    """

    prompt: str
    answer: str
    first: str
    then: str
    noise: str

    @property
    def space(self) -> str:
        """What stands between the beginning of an answer and the names."""
        return "" if self.answer.endswith(" ") else " "


TRACKING = TrackingSentences(
    prompt=(
        "The text below gives values to variables, to most of them by way of another one.\n\n{context}\n"
        "Which variables end up with {value}?"
    ),
    answer="\nThe {count} variables that end up with {value} are",
    first="Let {name} be {value}. ",
    then="Let {name} be {other}. ",
    noise=" ".join(EVALUATION_NOISE) + "\n",
)


def make_tracking(request: PromptRequest, sentences: TrackingSentences) -> PromptDraft:
    """Returns a prompt with one chain of `HOPS` hops.

    Raises:
        DataError: the length is too short.
    """
    rng = request.rng
    names, value = draw_names(rng, LETTERS), _draw_value(rng)
    example = draw_names(rng, EXAMPLE_LETTERS)
    shown = render(example, _draw_value(rng), _places(rng, EXAMPLE_LINES), EXAMPLE_LINES, sentences)
    solved = f"{''.join(shown)} {' '.join(example)}\n\n\n\n"
    at = request.fork()

    def write(count: int) -> PromptDraft:
        lines = count + len(names)
        user, prefix = render(names, value, _places(at(count), lines), lines, sentences)
        answer = Answer.of(*names, before=sentences.space, between=" ")
        return PromptDraft((solved + user,), prefix, answer, tuple(names))

    return request.fit(write, request.length)


def render(
    names: Sequence[str], value: int, places: Sequence[int], lines: int, sentences: TrackingSentences
) -> tuple[str, str]:
    """Returns the question and the beginning of its answer.

    The first name of the chain is assigned the value; `places` are the lines of noise before which assignments stand, rising.
    """
    chain = [
        sentences.first.format(name=names[0], value=value),
        *(sentences.then.format(name=name, other=other) for other, name in pairwise(names)),
    ]
    pieces = [sentences.noise] * lines
    for place, assignment in reversed(list(zip(places, chain, strict=True))):
        pieces.insert(place, assignment)
    user = sentences.prompt.format(context=" ".join(pieces), value=value)
    return user, sentences.answer.format(count=len(names), value=value)


def draw_names(rng: np.random.Generator, letters: int) -> list[str]:
    """Returns the different names of a chain, capital letters."""
    names: dict[str, None] = {}
    while len(names) < HOPS + 1:
        names["".join(rng.choice(list(string.ascii_uppercase), letters).tolist())] = None
    return list(names)


def _draw_value(rng: np.random.Generator) -> int:
    return int(rng.integers(10_000, 99_999))


def _places(rng: np.random.Generator, lines: int) -> list[int]:
    return sorted(rng.choice(lines, HOPS + 1, replace=False).tolist())
