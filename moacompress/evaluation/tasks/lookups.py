"""Lookups in a list: of lines, a name and a number each, and of pairs of words (associative recall, `prompts.recall`)."""

from __future__ import annotations

from moacompress.evaluation.tasks.drafts import Answer, PromptDraft
from moacompress.evaluation.tasks.task import PromptRequest
from moacompress.evaluation.tasks.vocabulary import WORDS
from moacompress.prompts.pools import KEYS_PER_SPLIT, draw_keys
from moacompress.prompts.recall import Recall, most_pairs, pairs_text, question

TEMPLATE = (
    "Every line of this list has a name and a number.\n\n{context}\nWhich number is on the line of {key}? Say it in a "
    "short sentence."
)
LINE = "{key} has the number {value}\n"
ANSWER = ("The line of {key} has the number ", ".")
"""What teacher forcing feeds around the number; generation gets no beginning."""
SAID = (TEMPLATE, LINE, ANSWER)
"""All that prompts and answers say."""
LARGEST = 50_000


def make_lines(request: PromptRequest) -> PromptDraft:
    """Returns a prompt of lines with different keys.

    Raises:
        DataError: the length is too short, or too long for the keys there are.
    """
    limit = min(request.length, KEYS_PER_SPLIT) - 1
    (asked, *others) = draw_keys(request.rng, "evaluation", limit + 1)
    (value, *values) = request.rng.integers(1, LARGEST + 1, limit + 1).tolist()
    depth = float(request.rng.random())
    before, after = ANSWER
    answer = Answer.of(str(value), before=before.format(key=asked), after=after)

    def write(count: int) -> PromptDraft:
        pairs = list(zip(others[:count], values, strict=False))
        pairs.insert(round(depth * count), (asked, value))
        user = TEMPLATE.format(context="".join(LINE.format(key=key, value=number) for key, number in pairs), key=asked)
        return PromptDraft((user,), "\n", answer, (str(value),))

    short = f"task {request.task} has {KEYS_PER_SPLIT:,} keys, too few for a prompt of {request.length:,} tokens"
    return request.fit(write, limit, short)


def make_recall(request: PromptRequest) -> PromptDraft:
    """Returns a list of different keys with words as values; no other key has the value asked for.

    Raises:
        DataError: the length is too short, or too long for the keys there are.
    """
    limit = most_pairs(request.length)
    recall = Recall.draw(request.rng, "evaluation", limit, WORDS)
    short = f"task {request.task} has {KEYS_PER_SPLIT:,} keys, too few for a prompt of {request.length:,} tokens"

    def write(count: int) -> PromptDraft:
        text = f"{pairs_text(recall.pairs(count))}{question(recall.asked)}"
        return PromptDraft((text,), "", Answer.of(recall.value), (recall.value,), plain=True)

    return request.fit(write, limit, short)
