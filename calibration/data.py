"""Calibration samples from a recipe: generators, local files and hub sets, answered by the dense model.

Deterministic by the recipe's seed. Calibration and validation never share a key, a value, a row or a stretch of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moacompress.calibration.answers import Draft, answer_drafts
from moacompress.calibration.generators import ANSWER_ROOM, TASKS, make_prompt
from moacompress.calibration.pools import SPLITS, Prose, Split
from moacompress.calibration.prompts import encode_conversation, encode_prompt, encode_text
from moacompress.calibration.rows import (
    Row,
    conversation,
    field,
    read_rows,
    row_kind,
    source_name,
    split_rows,
    split_text,
)
from moacompress.calibration.samples import SHORTEST, Sample
from moacompress.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moacompress.models import SourceModel
    from moacompress.progress import Progress
    from moacompress.recipe import Recipe, SourceRecipe

TEXT_TARGETS = 32
"""Target positions of a sample of plain text."""


def build_samples(source: SourceModel, recipe: Recipe, split: Split, progress: Progress | None = None) -> list[Sample]:
    """Returns the samples of a split, spread evenly over the recipe's lengths and by weight over its sources.

    Args:
        source: the dense model, which answers.
        recipe: `calibration` and `seed` count.
        split: "calibration" gives `samples` samples, "validation" `validation_samples`.
        progress: told about every answer.

    Raises:
        DataError: data missing, empty, without the columns needed, or too short; lengths that the model or the samples
            can not have; fewer samples than lengths.
    """
    calibration = recipe.calibration
    count = calibration.samples if split == "calibration" else calibration.validation_samples
    _check_lengths(calibration.lengths, count, source.context, split)
    text = None
    if any(part.generator is not None and part.haystack == "prose" for part in calibration.sources):
        if calibration.text is None:
            raise DataError("a source has the haystack prose, but calibration.text names no file or folder of it")
        text = Prose.load(calibration.text)
    shares = spread(count, len(calibration.lengths), [part.weight for part in calibration.sources])
    drafts: list[Draft] = []
    for number, part in enumerate(calibration.sources):
        wanted = {length: row[number] for length, row in zip(calibration.lengths, shares, strict=True) if row[number]}
        seed = (recipe.seed, SPLITS.index(split), number)
        if part.generator is not None:
            drafts += _generated(part, wanted, split, seed, source.tokenizer, text, calibration.answer_tokens)
        elif wanted:
            drafts += _from_rows(part, wanted, split, seed, source.tokenizer, calibration.answer_tokens)
    drafts.sort(key=lambda draft: draft.length)
    return answer_drafts(source.model, drafts, progress)


def spread(count: int, lengths: int, weights: Sequence[float]) -> list[list[int]]:
    """Returns how many samples each length (rows) takes from each source (columns).

    Lengths get equal numbers, the later ones one more where it does not divide. Sources get their weight's share by
    largest remainder; what rounding took from a source at one length is made good at the next.
    """
    total, carry, table = sum(weights), [0.0] * len(weights), []
    for index in range(lengths):
        here = count * (index + 1) // lengths - count * index // lengths
        due = [here * weight / total + rest for weight, rest in zip(weights, carry, strict=True)]
        row = [max(0, int(np.floor(share))) for share in due]
        while sum(row) < here:
            behind = max(range(len(due)), key=lambda i: (due[i] - row[i], -i))
            row[behind] += 1
        while sum(row) > here:
            ahead = max((i for i in range(len(due)) if row[i]), key=lambda i: (row[i] - due[i], i))
            row[ahead] -= 1
        carry = [share - got for share, got in zip(due, row, strict=True)]
        table.append(row)
    return table


def _check_lengths(lengths: Sequence[int], count: int, context: int, split: Split) -> None:
    if min(lengths) <= SHORTEST:
        raise DataError(
            f"samples of {min(lengths)} tokens were asked for; they must be longer than the largest sink, {SHORTEST} "
            "tokens"
        )
    if context and max(lengths) > context:
        raise DataError(
            f"samples of {max(lengths):,} tokens were asked for; the model was made for at most {context:,}"
        )
    if count < len(lengths):
        raise DataError(f"{count} {split} samples do not cover {len(lengths)} lengths; ask for at least one a length")


def _generated(
    part: SourceRecipe,
    wanted: dict[int, int],
    split: Split,
    seed: tuple[int, ...],
    tokenizer: PreTrainedTokenizerBase,
    text: Prose | None,
    answer_tokens: int,
) -> list[Draft]:
    kind = str(part.generator)
    task = TASKS[kind] if kind in TASKS else TASKS[f"{kind}-{part.haystack}"]
    drafts = []
    for length, count in wanted.items():
        for index in range(count):
            rng = np.random.default_rng((*seed, length, index))
            prompt = make_prompt(task, rng, split, tokenizer, length, text)
            ids = encode_prompt(tokenizer, prompt.user, prompt.prefix)
            needed = len(encode_text(tokenizer, f" {prompt.answer}", special=False)) + ANSWER_ROOM
            room = min(answer_tokens, needed, length - len(ids))
            name = kind if task.haystack is None else f"{kind}/{task.haystack}"
            drafts.append(Draft(ids, [False] * len(ids), room, name, length))
    return drafts


def _from_rows(
    part: SourceRecipe,
    wanted: dict[int, int],
    split: Split,
    seed: tuple[int, ...],
    tokenizer: PreTrainedTokenizerBase,
    answer_tokens: int,
) -> list[Draft]:
    rows, name = read_rows(part), source_name(part)
    kind = row_kind(rows, name)
    rng = np.random.default_rng(seed)
    if kind == "text":
        if len(rows) == 1:
            documents = [split_text(field(rows[0], "text", name, 0), split)]
        else:
            documents = [field(rows[i], "text", name, i) for i in split_rows(len(rows), split, name)]
        return [draft for length, n in wanted.items() for draft in _chop(documents, n, length, name, rng, tokenizer)]
    if kind == "messages" and tokenizer.chat_template is None:
        raise DataError(
            f"{name} holds `messages`, but the model has no chat template; give rows with `prompt` or `text`"
        )
    order = rng.permutation(split_rows(len(rows), split, name)).tolist()
    picker = _RowPicker(rows, order, name, kind == "messages", tokenizer)
    return [draft for length, n in wanted.items() for draft in picker.pick(n, length, answer_tokens, split)]


class _RowPicker:
    """Hands out prompts that fit a length, each row at most once; rows are tokenized as they are needed."""

    def __init__(
        self, rows: Sequence[Row], order: list[int], name: str, chat: bool, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.rows, self.left, self.name, self.chat, self.tokenizer = rows, order, name, chat, tokenizer
        self.encoded: dict[int, tuple[list[int], list[bool]]] = {}

    def pick(self, count: int, length: int, answer_tokens: int, split: Split) -> list[Draft]:
        """Returns `count` drafts whose prompt and answer take more than half of `length` and at most all of it."""
        low, high = max(length // 2, SHORTEST) - answer_tokens + 1, length - answer_tokens
        chosen: list[int] = []
        for index in self.left:
            if len(chosen) == count:
                break
            if low <= len(self.encode(index)[0]) <= high:
                chosen.append(index)
        if len(chosen) < count:
            sizes = sorted(len(ids) for ids, _ in self.encoded.values()) or [0]
            raise DataError(
                f"{self.name} has {len(chosen)} {split} prompts of {low:,} to {high:,} tokens left, of {count} needed "
                f"at {length:,} tokens (its {len(sizes)} {split} prompts have {sizes[0]:,} to {sizes[-1]:,}); give "
                "more or longer rows, or choose other lengths"
            )
        self.left = [index for index in self.left if index not in chosen]
        return [Draft(*self.encoded[index], answer_tokens, self.name, length) for index in chosen]

    def encode(self, index: int) -> tuple[list[int], list[bool]]:
        """Returns the ids of a row's prompt and which of them are targets."""
        if index not in self.encoded:
            if self.chat:
                turns = conversation(self.rows[index], self.name, index)
                self.encoded[index] = encode_conversation(self.tokenizer, turns)
            else:
                ids = encode_prompt(self.tokenizer, field(self.rows[index], "prompt", self.name, index))
                self.encoded[index] = ids, [False] * len(ids)
        return self.encoded[index]


def _chop(
    documents: Sequence[str],
    count: int,
    length: int,
    name: str,
    rng: np.random.Generator,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Draft]:
    """Returns `count` stretches of exactly `length` tokens, from as many documents as there are, begun at random."""
    start_ids = [token for token in encode_text(tokenizer, "") if token == tokenizer.bos_token_id]
    body = length - len(start_ids)
    long: list[list[int]] = []
    longest = 0
    for index in rng.permutation(len(documents)).tolist():
        ids = encode_text(tokenizer, documents[index], special=False)
        longest = max(longest, len(ids))
        if len(ids) >= body:
            long.append(ids)
        if len(long) == count:
            break
    if not long:
        raise DataError(
            f"the longest of {len(documents)} texts of {name} has {longest:,} tokens; stretches of {length:,} were "
            "asked for: give longer texts or shorter lengths"
        )
    drafts = []
    for index in range(count):
        ids = long[index % len(long)]
        begin = int(rng.integers(len(ids) - body + 1))
        mask = np.zeros(length, dtype=np.bool_)
        later = np.arange(length // 2, length)
        mask[rng.choice(later, size=min(TEXT_TARGETS, len(later)), replace=False)] = True
        drafts.append(Draft([*start_ids, *ids[begin : begin + body]], mask.tolist(), 0, name, length))
    return drafts
