"""Lookups in a list: of lines, a name and a number each, and of pairs of words (associative recall, `prompts.recall`)."""

from __future__ import annotations

from collections.abc import Sequence

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

    def write(count: int) -> PromptDraft:
        pairs = list(zip(others[:count], values, strict=False))
        pairs.insert(round(depth * count), (asked, value))
        return render_lines(pairs, asked, value)

    short = f"task {request.task} has {KEYS_PER_SPLIT:,} keys, too few for a prompt of {request.length:,} tokens"
    return request.fit(write, limit, short)


def render_lines(pairs: Sequence[tuple[str, int]], asked: str, value: int) -> PromptDraft:
    """Returns the prompt of keys and values in which the value of `asked` is asked for."""
    context = "".join(LINE.format(key=key, value=number) for key, number in pairs)
    user = TEMPLATE.format(context=context, key=asked)
    before, after = ANSWER
    return PromptDraft(
        (user,), "\n", Answer.of(str(value), before=before.format(key=asked), after=after), (str(value),)
    )


def make_recall(request: PromptRequest) -> PromptDraft:
    """Returns a list of different keys with words as values; no other key has the value asked for.

    Raises:
        DataError: the length is too short, or too long for the keys there are.
    """
    limit = most_pairs(request.length)
    recall = Recall.draw(request.rng, "evaluation", limit, WORDS)
    short = f"task {request.task} has {KEYS_PER_SPLIT:,} keys, too few for a prompt of {request.length:,} tokens"
    return request.fit(lambda count: render_recall(recall.pairs(count), recall.asked, recall.value), limit, short)


def render_recall(pairs: Sequence[tuple[str, str]], asked: str, value: str) -> PromptDraft:
    """Returns the list as text with `asked` at its end."""
    return PromptDraft((f"{pairs_text(pairs)}{question(asked)}",), "", Answer.of(value), (value,), plain=True)
