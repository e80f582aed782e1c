"""Associative recall in the manner of MQAR (Zoology, arXiv 2312.04927): pairs of words, then one key once more.

The text goes to the model as it is, without instructions or chat template, so that base models and tiny trained ones
can do it too.
"""

from __future__ import annotations

from collections.abc import Sequence

from moacompress.calibration.pools import KEYS_PER_SPLIT, draw_keys
from moacompress.evaluation.drafts import Answer, Draft
from moacompress.evaluation.request import Request
from moacompress.evaluation.vocabulary import WORDS


def make_recall(request: Request) -> Draft:
    """Returns a list of different keys with words as values; no other key has the value asked for.

    Raises:
        DataError: the length is too short, or too long for the keys there are.
    """
    limit = min(request.length, KEYS_PER_SPLIT) - 1
    (asked, *others) = draw_keys(request.rng, "evaluation", limit + 1)
    (value, *values) = [WORDS[index] for index in request.rng.permutation(len(WORDS)).tolist()]
    depth = float(request.rng.random())

    def write(count: int) -> Draft:
        pairs = [(key, values[index % len(values)]) for index, key in enumerate(others[:count])]
        pairs.insert(round(depth * count), (asked, value))
        return render(pairs, asked, value)

    short = f"task {request.task} has {KEYS_PER_SPLIT:,} keys, too few for a prompt of {request.length:,} tokens"
    return request.fit(write, limit, short)


def render(pairs: Sequence[tuple[str, str]], asked: str, value: str) -> Draft:
    """Returns the list as text with `asked` at its end."""
    text = "".join(f"{key}: {word}\n" for key, word in pairs)
    return Draft((f"{text}{asked}:",), "", Answer.of(value), (value,), plain=True)
