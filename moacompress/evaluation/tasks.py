"""Evaluation prompts: from the pools that neither calibration nor validation draw from, the same for every model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moacompress.calibration.generators import find_task, make_prompt
from moacompress.calibration.pools import SPLITS, Prose
from moacompress.calibration.prompts import encode_reference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Case:
    """One prompt to be scored.

    Attributes:
        task: name of its task.
        length: nominal length, tokens.
        prompt_ids: token ids up to where the answer begins, answer prefix included.
        answer_ids: token ids of the reference.
        is_value: for each of `answer_ids` whether it carries part of the value.
        answer: the reference as text.
    """

    task: str
    length: int
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    is_value: tuple[bool, ...]
    answer: str

    @property
    def tokens(self) -> int:
        """Number of tokens, the answer included."""
        return len(self.prompt_ids) + len(self.answer_ids)


def make_cases(
    task: str, length: int, count: int, seed: int, tokenizer: PreTrainedTokenizerBase, text: Prose | None
) -> list[Case]:
    """Returns `count` evaluation prompts of a task; a larger count begins with those of a smaller one.

    Raises:
        UsageError: unknown task.
        DataError: the length is too short for the task, or the text too short for the length or missing.
    """
    known = find_task(task)
    cases = []
    for index in range(count):
        rng = np.random.default_rng((seed, SPLITS.index("evaluation"), length, index))
        prompt = make_prompt(known, rng, "evaluation", tokenizer, length, text)
        prompt_ids, answer_ids, is_value = encode_reference(tokenizer, prompt)
        cases.append(Case(task, length, tuple(prompt_ids), tuple(answer_ids), tuple(is_value), prompt.answer))
    return cases


def mean_tokens(cases: Sequence[Case]) -> int:
    """Returns the mean number of tokens of the cases, rounded: the length at which their KV bytes are stated."""
    return round(sum(case.tokens for case in cases) / len(cases))
