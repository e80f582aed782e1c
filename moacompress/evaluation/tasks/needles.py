"""Needles in a haystack: one or more sentences of a key and its value, hidden in noise, prose or their like.

What is hidden, how deep and how much are RULER's settings (arXiv 2404.06654); the sentences are an argument. Prose is the
user's text from a random sentence on, where RULER always takes the beginning of one collection of essays. Sentences of
prose are told apart by their closing punctuation, where RULER asks NLTK.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moacompress.core.errors import DataError
from moacompress.evaluation.tasks.drafts import Answer, PromptDraft
from moacompress.evaluation.tasks.task import PromptRequest
from moacompress.prompts.pools import KEYS_PER_SPLIT, Prose, draw_keys, draw_numbers, draw_uuids, sentence_ends
from moacompress.prompts.sentences import EVALUATION_NEEDLES, NeedleSentences

NeedleKind = Literal["word", "number", "uuid"]
Context = Callable[[int], str]

DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int)
"""Where in prose a needle may be, in percent of the sentences."""
LINE_TOKENS = 4
"""A line of needles surely has more tokens: how many lines are drawn at most."""
_DRAW = {"word": draw_keys, "number": draw_numbers, "uuid": draw_uuids}


@dataclass(frozen=True)
class Needles:
    """What is hidden where, and how much of it is asked for.

    Attributes:
        haystack: `noise` repeats one line, `needles` has other needles, `prose` is the user's text.
        keys: how many keys are hidden.
        values: how many values each has.
        queries: how many keys are asked for.
        key_kind: what a key is.
        kind: what a value is.
    """

    haystack: Literal["noise", "prose", "needles"]
    keys: int = 1
    values: int = 1
    queries: int = 1
    key_kind: NeedleKind = "word"
    kind: NeedleKind = "number"


def make_needles(request: PromptRequest, needles: Needles, sentences: NeedleSentences) -> PromptDraft:
    """Returns a prompt that hides the needles at random depths and asks for some.

    Raises:
        DataError: the length is too short, or the prose is.
    """
    rng = request.rng
    keys = _DRAW[needles.key_kind](rng, "evaluation", needles.keys)
    drawn = iter(_DRAW[needles.kind](rng, "evaluation", needles.keys * needles.values))
    pairs = [(key, next(drawn)) for key in keys for _ in range(needles.values)]
    pairs = [pairs[index] for index in rng.permutation(len(pairs)).tolist()]
    asked = [keys[index] for index in rng.permutation(needles.keys)[: needles.queries].tolist()]
    # values of one key are listed as the text has them, keys as the question has them
    wanted = [value for key in asked for holder, value in pairs if holder == key]
    texts = [sentences.hide(needles.kind, key, value) for key, value in pairs]
    short = None
    if needles.haystack == "prose":
        context, limit, short = _prose(request, texts)
    else:
        noise = needles.haystack == "noise"
        lines = [" ".join(sentences.noise)] if noise else _distractors(request, needles, keys, sentences)
        depths = np.sort(rng.random(len(texts)))
        limit = request.length

        def context(count: int) -> str:
            return in_lines([lines[i % len(lines)] for i in range(count)], texts, depths)

    said = sentences.ask(needles.kind, asked, len(wanted))  # in the singular where one value is asked for

    def write(count: int) -> PromptDraft:
        user = f"{said.before}\n{context(count)}\n{said.after}"
        return PromptDraft((user,), f" {said.answer}", Answer.of(*wanted), tuple(wanted))

    return request.fit(write, limit, short)


def in_lines(lines: Sequence[str], needles: Sequence[str], depths: Sequence[float] | np.ndarray) -> str:
    """Returns the lines with every needle, in order, on a line of its own; depths are shares of the lines before, rising."""
    context = list(lines)
    for depth, text in reversed(list(zip(depths, needles, strict=True))):
        context.insert(int(depth * len(lines)), text)
    return "\n".join(context)


def in_sentences(words: Sequence[str], needles: Sequence[str], depths: Sequence[int] | np.ndarray) -> str:
    """Returns prose with every needle, in order, between two sentences; a depth is the percent of those before it, rising."""
    ends = [0, *sentence_ends(words)]
    context = list(words)
    for depth, text in reversed(list(zip(depths, needles, strict=True))):
        context.insert(ends[int(depth) * (len(ends) - 1) // 100], text)
    return " ".join(context)


def _prose(request: PromptRequest, texts: Sequence[str]) -> tuple[Context, int, str]:
    prose: Prose | None = request.resources.prose
    if prose is None:
        raise DataError(f"task {request.task} needs prose")
    words = prose.words(request.rng, "evaluation")
    depths = np.sort(request.rng.choice(DEPTHS, len(texts), replace=False))
    short = (
        f"the evaluation part of {prose.name} has {len(words):,} words, too few for a prompt of {request.length:,} "
        "tokens; give longer text"
    )
    return lambda count: in_sentences(words[:count], texts, depths), len(words), short


def _distractors(
    request: PromptRequest, needles: Needles, keys: Sequence[str], sentences: NeedleSentences
) -> list[str]:
    """Returns needles of other keys; where a long prompt needs more keys than there are, they come again."""
    count = request.length // LINE_TOKENS
    pool = min(count, KEYS_PER_SPLIT - len(keys)) if needles.key_kind == "word" else count
    drawn = _DRAW[needles.key_kind](request.rng, "evaluation", pool + len(keys))
    others = [key for key in drawn if key not in keys][:pool]
    values = _DRAW[needles.kind](request.rng, "evaluation", count)
    return [sentences.hide(needles.kind, others[i % len(others)], value) for i, value in enumerate(values)]


def make_second_question(request: PromptRequest) -> PromptDraft:
    """Returns a conversation of two questions about needles in noise, the first of them answered by its reference.

    What the first answer did not need may be what the second one needs, so a cache that keeps only what one question points to
    fails here.

    Raises:
        DataError: the length is too short.
    """
    rng = request.rng
    keys, values = draw_keys(rng, "evaluation", 2), draw_numbers(rng, "evaluation", 2)
    depths = np.sort(rng.random(2))
    hidden = rng.permutation(2).tolist()
    needles = [EVALUATION_NEEDLES.hide("number", keys[index], values[index]) for index in hidden]

    first, second = (EVALUATION_NEEDLES.ask("number", [key], 1) for key in keys)

    def write(count: int) -> PromptDraft:
        context = in_lines([" ".join(EVALUATION_NEEDLES.noise)] * count, needles, depths)
        messages = (
            f"{first.before}\n{context}\n{first.after}",
            f"{first.answer} {values[0]}.",
            second.after,
        )
        return PromptDraft(messages, f" {second.answer}", Answer.of(values[1]), (values[1],), second_turn=True)

    return request.fit(write, request.length)
