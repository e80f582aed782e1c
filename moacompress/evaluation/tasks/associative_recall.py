"""Associative recall: pairs of words, then one key once more (see `moacompress.prompts.recall`)."""

from __future__ import annotations

from collections.abc import Sequence

from moacompress.evaluation.tasks.drafts import Answer, PromptDraft
from moacompress.evaluation.tasks.task import PromptRequest
from moacompress.evaluation.tasks.vocabulary import WORDS
from moacompress.prompts.pools import KEYS_PER_SPLIT
from moacompress.prompts.recall import Recall, most_pairs, pairs_text, question


def make_recall(request: PromptRequest) -> PromptDraft:
    """Returns a list of different keys with words as values; no other key has the value asked for.

    Raises:
        DataError: the length is too short, or too long for the keys there are.
    """
    limit = most_pairs(request.length)
    recall = Recall.draw(request.rng, "evaluation", limit, WORDS)
    short = f"task {request.task} has {KEYS_PER_SPLIT:,} keys, too few for a prompt of {request.length:,} tokens"
    return request.fit(lambda count: render(recall.pairs(count), recall.asked, recall.value), limit, short)


def render(pairs: Sequence[tuple[str, str]], asked: str, value: str) -> PromptDraft:
    """Returns the list as text with `asked` at its end."""
    return PromptDraft((f"{pairs_text(pairs)}{question(asked)}",), "", Answer.of(value), (value,), plain=True)
