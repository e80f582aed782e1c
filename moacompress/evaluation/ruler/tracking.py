"""RULER's variable tracking: one chain of assignments in noise, all of whose variables are asked for.

A solved example with shorter names and ten lines of noise comes first, as published; RULER fits the example to 500
tokens, which are ten lines for common tokenizers.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from moacompress.evaluation.drafts import Answer, PromptDraft
from moacompress.evaluation.prompt_request import PromptRequest
from moacompress.prompts.pools import NOISE

TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined the "
    "value {value}, they are: "
)
"""With the published spelling."""
HOPS = 4
LETTERS, EXAMPLE_LETTERS = 5, 3
EXAMPLE_LINES = 10


def make_tracking(request: PromptRequest) -> PromptDraft:
    """Returns a prompt with one chain of `HOPS` hops.

    Raises:
        DataError: the length is too short.
    """
    rng = request.rng
    names, value = draw_names(rng, LETTERS), _draw_value(rng)
    example = draw_names(rng, EXAMPLE_LETTERS)
    solved = render_example(example, _draw_value(rng), _places(rng, EXAMPLE_LINES), EXAMPLE_LINES)
    at = request.fork()

    def write(count: int) -> PromptDraft:
        lines = count + len(names)
        user, prefix = render(names, value, _places(at(count), lines), lines)
        return PromptDraft((solved + user,), prefix, Answer.of(*names, before="", between=" "), tuple(names))

    return request.fit(write, request.length)


def render(names: Sequence[str], value: int, places: Sequence[int], lines: int) -> tuple[str, str]:
    """Returns the question and the beginning of its answer.

    Args:
        names: the variables of the chain, in order.
        value: what the first is assigned.
        places: for each assignment the line of noise before which it stands, rising.
        lines: lines of noise.
    """
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in pairwise(names))]
    pieces = [" ".join(NOISE) + "\n"] * lines
    for place, assignment in reversed(list(zip(places, chain, strict=True))):
        pieces.insert(place, assignment)
    user = TEMPLATE.format(context=" ".join(pieces), value=value)
    return user, PREFIX.format(count=len(names), value=value)


def render_example(names: Sequence[str], value: int, places: Sequence[int], lines: int) -> str:
    """Returns a question with its answer, as it stands before the one to be answered."""
    return f"{''.join(render(names, value, places, lines))} {' '.join(names)}\n\n\n\n"


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
