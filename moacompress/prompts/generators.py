"""Synthetic tasks that need one place far back: needles in a haystack, pairs of keys and values, records of fields, recall.

Every prompt is fitted to a length in tokens: chat template, answer prefix and room for the answer included, as near
below it as one sentence of noise, one word of prose, one pair of keys and values or one record allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from moacompress.core.errors import DataError
from moacompress.prompts.field_records import (
    EVALUATION_TEMPLATE,
    FIELDS,
    LAYOUTS,
    RECORD_FIELDS,
    TEMPLATE,
    FieldRecord,
    record_opening,
    record_value,
)
from moacompress.prompts.fitting import largest_fit
from moacompress.prompts.pools import (
    KEYS_PER_SPLIT,
    Prose,
    Split,
    draw_codes,
    draw_keys,
    draw_numbers,
    draw_uuids,
    sentence_ends,
)
from moacompress.prompts.recall import WORDS, Recall, most_pairs, pairs_text, question
from moacompress.prompts.sentences import needles_of
from moacompress.prompts.templates import Prompt, encode_prompt, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Haystack = Literal["noise", "prose"]
Values = Literal["numbers", "uuids", "codes"]
ANSWER_ROOM = 4
"""Tokens kept free after the reference answer, for a full stop and the closing token."""

PAIRS = 'Here is a JSON object of names and values.\n{context}\nWhich value does it have for "{key}"?'
EVALUATION_PAIRS = 'Names and their values are listed below as JSON.\n{context}\nWhat value is listed for "{key}"?'
PAIRS_PREFIX = '"{key}":'
RECORD_TOKENS = 8
"""A record surely has more tokens: how many are drawn at most."""


@dataclass(frozen=True)
class SyntheticTask:
    """One synthetic task.

    Attributes:
        name: as given on the command line and written in results.
        kind: `needle`, `multi-needle`, `key-value`, `records` or `recall`, as in recipes.
        haystack: the filler; None where the task makes its own.
    """

    name: str
    kind: str
    haystack: Haystack | None


TASKS = {
    task.name: task
    for task in (
        SyntheticTask("needle-noise", "needle", "noise"),
        SyntheticTask("needle-prose", "needle", "prose"),
        SyntheticTask("multi-needle-noise", "multi-needle", "noise"),
        SyntheticTask("multi-needle-prose", "multi-needle", "prose"),
        SyntheticTask("key-value", "key-value", None),
        SyntheticTask("records", "records", None),
        SyntheticTask("recall", "recall", None),
    )
}
KEYS_OF_KIND = {"needle": 1, "multi-needle": 4}
_KIND_OF_VALUE = {"numbers": "number", "uuids": "uuid", "codes": "code"}
_ENDING = {"numbers": "", "uuids": "-uuids", "codes": "-codes"}
"""How the name of a needle task ends, by its values."""
_DRAW = {"numbers": draw_numbers, "uuids": draw_uuids, "codes": draw_codes}


def make_prompt(
    task: str | SyntheticTask,
    rng: np.random.Generator,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    text: Prose | None = None,
    values: Values = "numbers",
) -> Prompt:
    """Returns a prompt of a task, at most `length` tokens with template, prefix and answer.

    Args:
        task: a task or its name.
        rng: draws keys, values, depth and prose; the same state gives the same prompt.
        split: the pools to draw from.
        tokenizer: the model's.
        length: tokens.
        text: the prose of prose tasks.
        values: what is hidden and asked for; `recall` has words of its own.

    Raises:
        DataError: `length` is too short for the task or the prose too short for `length`; a prose task without `text`.
    """
    task = TASKS[task] if isinstance(task, str) else task
    if task.kind == "key-value":
        return make_key_value(rng, split, tokenizer, length, values)
    if task.kind == "records":
        return make_records(rng, split, tokenizer, length, values)
    if task.kind == "recall":
        return make_recall(rng, split, tokenizer, length)
    return make_needle(rng, split, tokenizer, length, task.haystack or "noise", text, KEYS_OF_KIND[task.kind], values)


def make_needle(
    rng: np.random.Generator,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    haystack: Haystack = "noise",
    text: Prose | None = None,
    keys: int = 1,
    values: Values = "numbers",
) -> Prompt:
    """Returns a prompt of a haystack with `keys` needles at uniform depths, one of them asked for."""
    kind = "needle" if keys == 1 else "multi-needle"
    task, noun = f"{kind}-{haystack}{_ENDING[values]}", _KIND_OF_VALUE[values]
    names, hidden = draw_keys(rng, split, keys), _DRAW[values](rng, split, keys)
    sentences = needles_of(split)
    needles = [sentences.hide(noun, key, value) for key, value in zip(names, hidden, strict=True)]
    depths = rng.random(keys)
    asked = int(rng.integers(keys))
    if haystack == "prose":
        if text is None:
            raise DataError(f"task {task} needs prose: give a .txt file or a folder of them as text")
        words = text.words(rng, split)
        limit = len(words)
    else:
        words, limit = [], length
    said = sentences.ask(noun, [names[asked]], 1)

    def user(count: int) -> str:
        if haystack == "prose":
            context = _prose_context(words[:count], needles, depths)
        else:
            context = _noise_context(sentences.noise, count, needles, depths)
        return f"{said.before}\n{context}\n{said.after}"

    count = _fit(tokenizer, user, said.answer, hidden[asked], length, limit, task)
    if haystack == "prose" and count == limit:
        raise DataError(
            f"the {split} part of {text.name if text else ''} has {limit:,} words, too few for a prompt of {length:,} "
            "tokens; give longer text"
        )
    return Prompt(user(count), said.answer, hidden[asked], task, kind)


def make_key_value(
    rng: np.random.Generator,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    values: Values = "numbers",
) -> Prompt:
    """Returns a JSON object of word keys and 7-digit numbers, UUIDs or codes, one of which is asked for."""
    limit = min(length, KEYS_PER_SPLIT) - 1
    count = limit + 1
    (asked, *others), (value, *fillers) = draw_keys(rng, split, count), _DRAW[values](rng, split, count)
    quote = "" if values == "numbers" else '"'
    depth = float(rng.random())
    prefix = PAIRS_PREFIX.format(key=asked)

    def user(count: int) -> str:
        pairs = [f'"{key}": {quote}{filler}{quote}' for key, filler in zip(others[:count], fillers, strict=False)]
        pairs.insert(round(depth * count), f'"{asked}": {quote}{value}{quote}')
        template = EVALUATION_PAIRS if split == "evaluation" else PAIRS
        return template.format(context="{" + ",\n".join(pairs) + "}", key=asked)

    answer = f"{quote}{value}{quote}"
    count = _fit(tokenizer, user, prefix, answer, length, limit, "key-value")
    return Prompt(user(count), prefix, answer, "key-value", "key-value")


def make_records(
    rng: np.random.Generator,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    values: Values = "numbers",
) -> Prompt:
    """Returns records of a few fields each, all in one layout, and asks for one field of one of them."""
    limit = min(length // RECORD_TOKENS, KEYS_PER_SPLIT - 1)
    layout, fields = LAYOUTS[int(rng.integers(len(LAYOUTS)))], FIELDS[split]
    drawn = iter(_DRAW[values](rng, split, RECORD_FIELDS * (limit + 1)))
    asked, *others = [
        FieldRecord(
            key,
            tuple(
                (fields[index], record_value(next(drawn), layout))
                for index in rng.permutation(len(fields))[:RECORD_FIELDS].tolist()
            ),
        )
        for key in draw_keys(rng, split, limit + 1)
    ]
    field, answer = asked.fields[int(rng.integers(RECORD_FIELDS))]
    depth = float(rng.random())
    prefix = record_opening(layout, asked.key, field)

    def user(count: int) -> str:
        records = [record.text(layout) for record in others[:count]]
        records.insert(round(depth * count), asked.text(layout))
        template = EVALUATION_TEMPLATE if split == "evaluation" else TEMPLATE
        return template.format(context="\n".join(records), field=field, key=asked.key)

    count = _fit(tokenizer, user, prefix, answer, length, limit, "records")
    return Prompt(user(count), prefix, answer, "records", "records")


def make_recall(rng: np.random.Generator, split: Split, tokenizer: PreTrainedTokenizerBase, length: int) -> Prompt:
    """Returns lines of a key and a word each, and one key once more; no chat template, no instructions.

    Raises:
        DataError: evaluation makes its own, or more keys are needed than there are.
    """
    if split not in WORDS:
        raise DataError(f"the generator recall has no words for {split}; use the evaluation task recall")
    limit = most_pairs(length)
    recall = Recall.draw(rng, split, limit, WORDS[split])

    def user(count: int) -> str:
        return pairs_text(recall.pairs(count))

    count = _fit(tokenizer, user, question(recall.asked), recall.value, length, limit, "recall", plain=True)
    if count == limit:
        raise DataError(
            f"the generator recall has {KEYS_PER_SPLIT:,} keys, too few for a prompt of {length:,} tokens; ask for "
            "shorter lengths"
        )
    return Prompt(user(count), question(recall.asked), recall.value, "recall", "recall", plain=True)


def _noise_context(noise: Sequence[str], sentences: int, needles: list[str], depths: np.ndarray) -> str:
    """Returns `sentences` sentences of noise, a line holding each once, with each needle on a line of its own."""
    whole, rest = divmod(sentences, len(noise))
    lines = [" ".join(noise)] * whole + ([" ".join(noise[:rest])] if rest else [])
    for depth, needle in sorted(zip(depths.tolist(), needles, strict=True), reverse=True):
        lines.insert(round(depth * whole), needle)
    return "\n".join(lines)


def _prose_context(words: list[str], needles: list[str], depths: np.ndarray) -> str:
    """Returns the words with each needle after the sentence end nearest to its depth."""
    ends = np.array([0, *sentence_ends(words)])
    pieces = list(words)
    for depth, needle in sorted(zip(depths.tolist(), needles, strict=True), reverse=True):
        pieces.insert(int(ends[np.abs(ends - depth * len(words)).argmin()]), needle)
    return " ".join(pieces)


def _fit(
    tokenizer: PreTrainedTokenizerBase,
    user: Callable[[int], str],
    prefix: str,
    answer: str,
    length: int,
    limit: int,
    task: str,
    plain: bool = False,
) -> int:
    """Returns the largest number of filler pieces, up to `limit`, with which prompt and answer fit `length` tokens."""
    room = len(encode_text(tokenizer, f" {answer}", special=False)) + ANSWER_ROOM

    def tokens(count: int) -> int:
        return len(encode_prompt(tokenizer, user(count), prefix, plain)) + room

    return largest_fit(tokens, length, limit, task)
