"""The prompts that rivals answer: the product's own evaluation prompts as tokens, with where each one's question begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moacompress.core.errors import DataError
from moacompress.evaluation.tasks.cases import Case
from moacompress.evaluation.tasks.registry import Resources, make_cases
from moacompress.prompts.generators import ANSWER_ROOM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEEN, UNSEEN = "seen", "unseen"
"""Whether a rival that evicts once, when it has read a prompt, has read the question by then."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        case: what is asked, and how an answer is judged.
        index: which of its task and length it is.
        question_at: `prompt_ids[question_at:]` is the question, and the template behind it.
        new_tokens: most tokens that an answer may have: those of the reference and a few more, so that no time goes into
            what a model says behind its answer.
    """

    case: Case
    index: int
    question_at: int
    new_tokens: int


def make_prompts(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    lengths: Sequence[int],
    count: int,
    resources: Resources,
    seed: int = 0,
) -> list[Prompt]:
    """Returns the prompts of some tasks and lengths.

    There are `count` of each task and length, in tokens with the answer; `resources` are texts that some tasks need.

    Raises:
        UsageError: an unknown task.
        DataError: a text is missing, or a prompt does not say where its question begins.
    """
    found = []
    for task in tasks:
        for length in lengths:
            for index, case in enumerate(make_cases(task, length, count, seed, tokenizer, resources)):
                if case.question_at is None:
                    raise DataError(
                        f"a prompt of {task} does not say where its question begins, so that none can be left unseen"
                    )
                new_tokens = min(case.new_tokens, len(case.answer_ids) + ANSWER_ROOM)
                found.append(Prompt(case, index, case.question_at, new_tokens))
    return found


def stop_tokens_of(folder: Path) -> list[int]:
    """Returns the tokens at which a model's answers end, of its generation config."""
    from transformers import GenerationConfig

    found: Any = GenerationConfig.from_pretrained(folder).eos_token_id
    return list(found) if isinstance(found, list) else [found]
