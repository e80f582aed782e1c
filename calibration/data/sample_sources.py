"""Calibration samples from a recipe: generators, local files and hub sets, answered by the dense model; plain text.

Deterministic by the recipe's seed. Calibration and validation never share a key, a value, a row, a document of
questions or a stretch of text. Nor do the samples that gates are trained on and those that rules are priced on share a row, a
document or a stretch: see `gate_samples`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moacompress.calibration.data.answers import AnswerStore, SampleDraft, answer_drafts
from moacompress.calibration.data.data_rows import (
    DataRow,
    conversation,
    field,
    first_of_each,
    read_rows,
    row_kind,
    rows_for,
    source_name,
    split_rows,
)
from moacompress.calibration.data.joined import joined_drafts
from moacompress.calibration.data.plain import chop
from moacompress.calibration.data.samples import SHORTEST, Sample
from moacompress.core.errors import DataError
from moacompress.core.ranks import rank
from moacompress.models.processes import broadcast
from moacompress.prompts.generators import ANSWER_ROOM, TASKS, make_prompt
from moacompress.prompts.library_source import calibration_modules
from moacompress.prompts.pools import SPLITS, CalibrationPart, Prose, Split, pool_of
from moacompress.prompts.templates import encode_conversation, encode_prompt, encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moacompress.core.progress import Progress
    from moacompress.models.source import SourceModel
    from moacompress.recipe import Recipe
    from moacompress.recipe_sections import SourceRecipe

logger = logging.getLogger(__name__)

SOURCE_CODE = "source-code"
"""The generator that gives plain text."""
SAMPLES_OPTION = {"calibration": "--samples", "validation": "--validation-samples"}
"""Options that say how many samples a split has."""
_TEXT_STREAM = 2**31
"""Stands in the seed of `text_samples` where a source has its number."""


def build_samples(
    source: SourceModel,
    recipe: Recipe,
    split: Split,
    progress: Progress | None = None,
    answers: AnswerStore | None = None,
) -> list[Sample]:
    """Returns the samples of a split, spread evenly over the recipe's lengths and by weight over its sources.

    Under `torchrun` every process must call it; they share the answering of what the first one drafts.

    Those of validation have `longer_samples` of twice the longest length beside them, where `longer_counts` finds room for
    them: whether windows grow as they should shows at a length that nothing was fitted to. After them come samples of plain
    text: `text_samples` for calibration, and as large a share of the validation samples.

    Raises:
        DataError: from `make_drafts`.
        ArtefactError: answers cannot be written.
    """
    drafts = broadcast(None if rank() else make_drafts(source, recipe, split))
    return answer_drafts(source.model, drafts, progress, answers)


def check_data(recipe: Recipe) -> None:
    """Refuses data that no samples can be made of, before a model is loaded. Local files are read, hub sets are not.

    Raises:
        DataError: data missing, unreadable, empty or without the columns needed.
    """
    calibration = recipe.calibration
    for name in (*(part.path for part in calibration.sources), calibration.text):
        if name and not Path(name).exists():
            raise DataError(f"cannot read {name}: there is no such file or folder; give its path (--source, --text)")
    if _load_prose(recipe) is None and calibration.text is not None:
        Prose.load(calibration.text)
    for part in calibration.sources:
        if part.path is not None:
            row_kind(read_rows(part), source_name(part))


@dataclass(frozen=True)
class RowsWanted:
    """How many rows a profile takes of a file or hub set whose rows are a sample each.

    Attributes:
        source: its name.
        rows: that it has; a local one that repeats an earlier one does not count.
        wanted: samples that a profile makes of them, by split.
        needed: rows with which every split has about so many: which split a row is in depends on its hash.
    """

    source: str
    rows: int
    wanted: dict[Split, int]
    needed: int


def rows_wanted(recipe: Recipe) -> list[RowsWanted]:
    """Returns how many rows a profile takes of each file and hub set; plain text, which is cut as is needed, has none.

    Raises:
        DataError: as `check_data`.
    """
    calibration, found = recipe.calibration, []
    weights = [part.weight for part in calibration.sources]
    counts: dict[Split, int] = {"calibration": calibration.samples, "validation": calibration.validation_samples}
    shares = {split: spread(count, len(calibration.lengths), weights) for split, count in counts.items()}
    for number, given in enumerate(calibration.sources):
        if given.generator is None and row_kind(rows := read_rows(given), name := source_name(given)) != "text":
            wanted = {split: sum(row[number] for row in table) for split, table in shares.items()}
            found.append(RowsWanted(name, len(rows), wanted, rows_for(wanted)))
    return found


def make_drafts(
    source: SourceModel,
    recipe: Recipe,
    split: Split,
    beside: Sequence[SampleDraft] | None = None,
    may_lack: bool = False,
) -> list[SampleDraft]:
    """Returns the samples of a split before the dense model has answered; the model does not run.

    Args:
        source: the dense model, whose tokenizer counts.
        recipe: of the profile.
        split: calibration or validation.
        beside: what is profiled, where these are the samples that gates are trained on: they are of texts that are left for
            gates, and of other rows; where too few of these are left there are fewer samples.
        may_lack: makes fewer samples of files and hub sets with too few prompts or questions, of the rows of all splits.

    Raises:
        DataError: data missing, empty, without the columns needed, or too short; lengths that the model or the samples
            cannot have; fewer samples than lengths.
    """
    calibration, tokenizer = recipe.calibration, source.tokenizer
    count = calibration.samples if split == "calibration" else calibration.validation_samples
    check_counts(calibration.lengths, count, source.context, split)
    part: CalibrationPart | None = "profile" if beside is None else "gates"
    if split != "calibration" or not recipe.profile.gates:
        part = None
    used = None if beside is None else {tuple(draft.ids) for draft in beside}
    prose = _load_prose(recipe, part)
    maker = _DraftMaker(recipe, split, tokenizer, part, prose, used, may_lack)
    shares = spread(count, len(calibration.lengths), [part.weight for part in calibration.sources])
    lengths = list(calibration.lengths)
    if split == "validation":
        lengths.append(2 * lengths[-1])
        shares.append(longer_counts(recipe, source.context))
    drafts: list[SampleDraft] = []
    for number, given in enumerate(calibration.sources):
        wanted = {length: row[number] for length, row in zip(lengths, shares, strict=True) if row[number]}
        seed = (recipe.seed, SPLITS.index(split), number)
        if given.generator is not None:
            longer = {length: wanted.pop(length) for length in [*wanted] if length not in calibration.lengths}
            drafts += maker.generated(given, wanted, seed)
            try:
                drafts += maker.generated(given, longer, seed)
            except DataError as error:
                logger.warning(
                    "no plan will be measured on %s beyond the lengths that were asked for: %s", given.generator, error
                )
        elif wanted:
            drafts += maker.from_rows(given, wanted, seed)
    drafts.sort(key=lambda draft: draft.length)
    if prose is not None and calibration.text_samples:
        try:
            drafts += maker.plain_text(prose)
        except DataError as error:
            if split == "calibration":
                raise
            logger.warning("plans will not be measured on plain text: of the %s texts, %s", split, error)
    return drafts


def _load_prose(recipe: Recipe, part: CalibrationPart | None = None) -> Prose | None:
    calibration = recipe.calibration
    if any(part.generator is not None and part.haystack == "prose" for part in calibration.sources):
        needed = "a source has the haystack prose"
    elif calibration.text_samples:
        needed = f"{calibration.text_samples} samples of plain text were asked for"
    else:
        return None
    if calibration.text is None:
        raise DataError(f"{needed}, but calibration.text names no file or folder of it (--text)")
    return Prose.load(calibration.text, part)


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


def longer_counts(recipe: Recipe, context: int) -> list[int]:
    """Returns how many validation samples of twice the longest length each source gives.

    Generators give them: a file may have none so long. Where the model's context, in tokens, has no room for them there are
    none; 0 is no limit.
    """
    calibration = recipe.calibration
    weights = [part.weight if part.generator is not None else 0.0 for part in calibration.sources]
    if not any(weights) or (context and 2 * max(calibration.lengths) > context):
        return [0] * len(weights)
    return spread(calibration.longer_samples, 1, weights)[0]


def varied(drafts: Sequence[SampleDraft], count: int) -> list[SampleDraft]:
    """Returns `count` of the drafts, of as many sources and lengths as there are, in their order."""
    sources = list(dict.fromkeys(draft.source for draft in drafts))
    lengths = sorted({draft.length for draft in drafts})
    seen: dict[tuple[str, int], int] = {}
    ranks = []
    for index, draft in enumerate(drafts):
        again = seen.setdefault((draft.source, draft.length), 0)
        seen[draft.source, draft.length] += 1
        number = sources.index(draft.source)
        turn = (lengths.index(draft.length) - number) % len(lengths)  # the first turn has one length of every source
        ranks.append((again, turn, number, index))
    return [drafts[index] for index in sorted(rank[-1] for rank in sorted(ranks)[:count])]


def check_counts(lengths: Sequence[int], count: int, context: int, split: Split) -> None:
    """Refuses lengths and numbers of samples that there cannot be; a `context` of 0 is no limit.

    Raises:
        DataError: lengths that are too short or beyond the context, or fewer samples than lengths.
    """
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


@dataclass(frozen=True)
class _DraftMaker:
    """Makes the drafts of one split; see `make_drafts`, and there `beside` for `part` and `used`."""

    recipe: Recipe
    split: Split
    tokenizer: PreTrainedTokenizerBase
    part: CalibrationPart | None
    prose: Prose | None
    used: Collection[tuple[int, ...]] | None
    may_lack: bool

    def generated(self, given: SourceRecipe, wanted: dict[int, int], seed: tuple[int, ...]) -> list[SampleDraft]:
        """Returns so many prompts of a generator by length."""
        tokenizer, kind = self.tokenizer, str(given.generator)
        if kind == SOURCE_CODE:
            texts = pool_of(calibration_modules(), self.split, "Python's standard library", self.part)
            return chop([*texts.values()], wanted, kind, np.random.default_rng(seed), tokenizer)
        task = TASKS[kind] if kind in TASKS else TASKS[f"{kind}-{given.haystack}"]
        parts = (kind, task.haystack, None if given.values == "numbers" else given.values)
        name, drafts = "/".join(filter(None, parts)), list[SampleDraft]()
        for length, count in wanted.items():
            for index in range(count):
                rng = np.random.default_rng((*seed, length, index))
                prompt = make_prompt(task, rng, self.split, tokenizer, length, self.prose, given.values)
                ids = encode_prompt(tokenizer, prompt.user, prompt.prefix, prompt.plain)
                needed = len(encode_text(tokenizer, f" {prompt.answer}", special=False)) + ANSWER_ROOM
                room = min(self.recipe.calibration.answer_tokens, needed, length - len(ids))
                drafts.append(SampleDraft(ids, [False] * len(ids), room, name, length))
        return drafts

    def from_rows(self, given: SourceRecipe, wanted: dict[int, int], seed: tuple[int, ...]) -> list[SampleDraft]:
        """Returns so many samples of a file or hub set by length."""
        rows, name, split, tokenizer = read_rows(given), source_name(given), self.split, self.tokenizer
        kind, answer_tokens = row_kind(rows, name), self.recipe.calibration.answer_tokens
        rng = np.random.default_rng(seed)
        if kind == "text":
            texts = [field(rows[index], "text", name, index) for index in first_of_each(rows, kind, name)]
            return chop([*pool_of(texts, split, name, self.part).values()], wanted, name, rng, tokenizer)
        if kind == "question":
            return joined_drafts(rows, name, wanted, split, seed, tokenizer, answer_tokens, self.part, self.may_lack)
        first = first_of_each(rows, kind, name)
        own = list(first) if self.may_lack else split_rows(first, split, name)
        order: list[int] = rng.permutation(own).tolist()
        fewer = self.may_lack or self.used is not None
        picker = _RowPicker(rows, order, name, kind == "messages", tokenizer, self.used or (), fewer)
        drafts = [draft for length, n in wanted.items() for draft in picker.pick(n, length, answer_tokens, split)]
        if self.used is None:
            picker.say_left_out(list(wanted), answer_tokens, split)
        return drafts

    def plain_text(self, prose: Prose) -> list[SampleDraft]:
        """Returns the `text_samples` of calibration, and as large a share of the validation samples."""
        calibration = self.recipe.calibration
        count = calibration.text_samples
        if self.split == "validation":
            count = max(1, round(count * calibration.validation_samples / calibration.samples))
        shares = spread(count, len(calibration.lengths), [1.0])
        wanted = {length: row[0] for length, row in zip(calibration.lengths, shares, strict=True)}
        rng = np.random.default_rng((self.recipe.seed, SPLITS.index(self.split), _TEXT_STREAM))
        documents = [" ".join(words) for words in prose.pools[self.split]]
        return chop(documents, wanted, f"text:{Path(prose.name).name}", rng, self.tokenizer)


@cache
def _warn_once(text: str) -> None:
    """Logs a warning, once: the samples of a run are made more than once."""
    logger.warning("%s", text)


class _RowPicker:
    """Hands out prompts that fit a length, each row at most once; rows are tokenized as they are needed.

    Args:
        rows: all of the source's.
        order: indices of those to choose among, in the order in which they are tried.
        name: of the source.
        chat: whether rows are conversations.
        tokenizer: the model's.
        used: token ids of prompts that are not to be chosen.
        may_lack: too few are no error.
    """

    def __init__(
        self,
        rows: Sequence[DataRow],
        order: list[int],
        name: str,
        chat: bool,
        tokenizer: PreTrainedTokenizerBase,
        used: Collection[tuple[int, ...]] = (),
        may_lack: bool = False,
    ) -> None:
        self.rows, self.left, self.name, self.chat, self.tokenizer = rows, order, name, chat, tokenizer
        self.used, self.may_lack = used, may_lack
        self.encoded: dict[int, tuple[list[int], list[bool]]] = {}

    def pick(self, count: int, length: int, answer_tokens: int, split: Split) -> list[SampleDraft]:
        """Returns `count` drafts whose prompt and longest answer take more than half of `length` and at most all of it."""
        low, high = max(length // 2 - answer_tokens, SHORTEST) + 1, length - answer_tokens
        if low > high:
            raise DataError(
                f"samples of {length:,} tokens leave no room for a prompt of {self.name} beside an answer of "
                f"{answer_tokens:,}; a prompt must be longer than the largest sink, {SHORTEST} tokens: ask for longer samples "
                "or shorter answers (calibration.answer_tokens)"
            )
        chosen: list[int] = []
        for index in self.left:
            if len(chosen) == count:
                break
            ids, _ = self.encode(index)
            if low <= len(ids) <= high and tuple(ids) not in self.used:
                chosen.append(index)
        if len(chosen) < count and not self.may_lack:
            raise DataError(
                f"{self.name} has {len(chosen)} {split} prompts of {low:,} to {high:,} tokens left, of {count} needed "
                f"at {length:,} tokens; {self._sizes(answer_tokens, split)}; choose such lengths (--lengths), ask for fewer "
                f"samples ({SAMPLES_OPTION[split]}), or give more rows"
            )
        self.left = [index for index in self.left if index not in chosen]
        return [SampleDraft(*self.encoded[index], answer_tokens, self.name, length) for index in chosen]

    def say_left_out(self, lengths: Sequence[int], answer_tokens: int, split: Split) -> None:
        """Warns of prompts that were tried and are too long, or too short, for every length."""
        low, high = min(lengths) // 2 - answer_tokens, max(lengths) - answer_tokens
        sizes = [len(ids) for ids, _ in self.encoded.values()]
        longer, shorter = [size for size in sizes if size > high], [size for size in sizes if size <= low]
        text = f"of {len(sizes)} {split} prompts of {self.name} that were tried"
        if longer:
            _warn_once(
                f"{len(longer)} {text} are longer than {high:,} tokens, for which samples of {max(lengths):,} have room beside "
                f"an answer of {answer_tokens}, and are left out; the longest has {max(longer):,}"
            )
        if shorter:
            _warn_once(
                f"{len(shorter)} {text} have at most {low:,} tokens, too few for samples of {min(lengths):,}, and are left "
                f"out; the shortest has {min(shorter):,}"
            )

    def _sizes(self, answer_tokens: int, split: Split) -> str:
        """Returns how long the prompts are, and how many of them each power of two would take."""
        sizes = sorted(len(ids) for ids, _ in self.encoded.values())
        if not sizes:
            return f"it has no {split} prompts"
        fits = Counter(1 << (size + answer_tokens - 1).bit_length() for size in sizes if size > SHORTEST)
        shown = (
            ", ".join(f"{count} fit {length:,}" for length, count in sorted(fits.items())) or "too few for any length"
        )
        return f"its {len(sizes)} {split} prompts have {sizes[0]:,} to {sizes[-1]:,} tokens: {shown}"

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
