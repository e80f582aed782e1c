"""A kind of prompt, and what it gets to write one: the length, a source of randomness, the tokenizer, and the user's texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from moacompress.core.errors import DataError
from moacompress.evaluation.tasks.cases import Match
from moacompress.evaluation.tasks.drafts import PromptDraft, draft_ids
from moacompress.evaluation.tasks.squad_questions import Questions
from moacompress.prompts.fitting import largest_fit
from moacompress.prompts.generators import ANSWER_ROOM
from moacompress.prompts.pools import EVALUATION_ADJECTIVES, NOUNS, Prose
from moacompress.prompts.sentences import wording_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Need = Literal["prose", "squad"]
OWN, UNSEEN, CALIBRATED = "own rows", "unseen kinds", "calibrated kinds"
TEXT = "text"
"""Name of the task of long text, whose prompts are windows of it; it is no `EvaluationTask`."""
KINDS = (OWN, UNSEEN, CALIBRATED)
"""What prompts are to calibration, the one that a claim rests on first: rows of the user's own, kinds that no calibration has,
and kinds that calibration's generators make too."""


@dataclass(frozen=True)
class Resources:
    """Texts that some tasks need and moacompress does not bring.

    Attributes:
        prose: long text, the haystack of prose tasks.
        squad: file of SQuAD (v1.1 or v2), for question answering.
        own: tasks of the user's own rows, by name; see `own_rows`.
    """

    prose: Prose | None = None
    squad: str | Path | None = None
    own: Mapping[str, EvaluationTask] = field(default_factory=dict)

    @cached_property
    def questions(self) -> Questions:
        """The questions of `squad`, read once.

        Raises:
            DataError: not given, unreadable, or not SQuAD.
        """
        if self.squad is None:
            raise DataError("no SQuAD file was given")
        return Questions.load(self.squad)


@dataclass(frozen=True)
class PromptRequest:
    """One prompt to be written.

    Attributes:
        task: name of the task, for messages.
        length: tokens that prompt and generated answer may have.
        index: which prompt of the task it is.
        seed: of the whole set of prompts.
        rng: random numbers of this prompt alone.
        tokenizer: the model's.
        new_tokens: most tokens generated; 0 for as many as the reference takes.
        resources: texts.
    """

    task: str
    length: int
    index: int
    seed: int
    rng: np.random.Generator
    tokenizer: PreTrainedTokenizerBase
    new_tokens: int = 0
    resources: Resources = field(default_factory=Resources)

    def tokens(self, draft: PromptDraft) -> int:
        """Returns the tokens that a draft takes: the prompt, and the longer of reference and generated answer."""
        prompt = len(draft_ids(self.tokenizer, draft))
        answer = len(self.tokenizer(draft.answer.text, add_special_tokens=False)["input_ids"])
        return prompt + max(self.new_tokens, answer + ANSWER_ROOM)

    def fit(self, write: Callable[[int], PromptDraft], limit: int, short: str | None = None) -> PromptDraft:
        """Returns the draft with the most filler that fits the length.

        Args:
            write: makes the draft with so many pieces of filler; the same number gives the same draft.
            limit: pieces there are.
            short: what to say where all pieces are too few to come near the length; None where that is no error.

        Raises:
            DataError: too long without filler, or `short`.
        """
        count = largest_fit(lambda pieces: self.tokens(write(pieces)), self.length, limit, self.task)
        if short is not None and count == limit:
            raise DataError(short)
        return write(count)

    def fork(self) -> Callable[[int], np.random.Generator]:
        """Returns a function that gives for a number of pieces a generator of its own, the same at every call."""
        state = int(self.rng.integers(2**62))
        return lambda count: np.random.default_rng((state, count))


@dataclass(frozen=True)
class EvaluationTask:
    """A kind of prompt.

    Attributes:
        name: as given on the command line and written in results.
        description: one line for a reader.
        write: makes the draft of one prompt.
        sentences: returns all that its prompts say but for what is drawn, for `wording`.
        new_tokens: most tokens generated, or of given prompts what they are at least; 0 for as many as the reference takes
            and a few more.
        match: how an answer is compared, see `Case`.
        needs: the user's text that the task needs, or None.
        ruler: one of RULER's, whose sentences an installed package ships.
        calibrated: calibration has prompts of this kind, of other pools: needles, and pairs of keys and numbers.
        given: the prompts, where they are the user's own and no length is asked of them; None where they are written.
    """

    name: str
    description: str
    write: Callable[[PromptRequest], PromptDraft]
    sentences: Callable[[], object]
    new_tokens: int = 0
    match: Match = "all"
    needs: Need | None = None
    ruler: bool = False
    calibrated: bool = False
    given: tuple[PromptDraft, ...] | None = None

    @property
    def wording(self) -> str:
        """A digest of what its prompts say, 16 hex digits: prompts of two wordings are not one task.

        Raises:
            UsageError: one of RULER's, and the package is not installed.
        """
        return wording_of(self.sentences(), *((EVALUATION_ADJECTIVES, NOUNS) if self.given is None else ()))

    @property
    def kind(self) -> str:
        """Which of `KINDS` its prompts are."""
        return CALIBRATED if self.calibrated else UNSEEN if self.given is None else OWN

    def lengths(self, asked: Iterable[int]) -> list[int]:
        """Returns the lengths at which it has prompts, of those asked for: those that are given are taken once."""
        lengths = sorted(set(asked))
        return lengths if self.given is None else lengths[-1:]

    @property
    def requirements(self) -> str:
        """What is to be given or installed for it, in words; empty for nothing."""
        given = {"prose": "--text", "squad": "--squad"}
        needs = [given[self.needs]] if self.needs else []
        return ", ".join([*needs, *(["the extra eval"] if self.ruler else [])])
