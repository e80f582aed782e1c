"""The registry of evaluation tasks: their names, what they need, and the prompts they make.

Prompts come from the pools that neither calibration nor validation draw from, and are the same whatever models run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from moacompress.core.errors import DataError, UsageError, did_you_mean
from moacompress.evaluation.associative_recall import make_recall
from moacompress.evaluation.cases import Case, Match
from moacompress.evaluation.drafts import Answer, PromptDraft, encode_draft
from moacompress.evaluation.foreign.dialogue_fact import make_dialogue_fact
from moacompress.evaluation.foreign.legal_codes import make_legal_codes
from moacompress.evaluation.foreign.table_lookup import make_table_lookup
from moacompress.evaluation.longeval import make_lines
from moacompress.evaluation.prompt_request import PromptRequest, Resources
from moacompress.evaluation.ruler.counting import make_common, make_frequent
from moacompress.evaluation.ruler.needles import Needles, make_needles
from moacompress.evaluation.ruler.questions import make_question
from moacompress.evaluation.ruler.tracking import make_tracking
from moacompress.evaluation.second_question import make_second_question
from moacompress.prompts.generators import ANSWER_ROOM, make_prompt
from moacompress.prompts.pools import SPLITS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "GROUPS",
    "TASKS",
    "EvaluationTask",
    "Resources",
    "check_resources",
    "expand_tasks",
    "find_task",
    "make_cases",
]

Need = Literal["prose", "squad"]
_HOW = {
    "prose": "give a .txt file or a folder of them as text",
    "squad": "give a SQuAD file, such as dev-v2.0.json",
}
_WHAT = {"prose": "prose", "squad": "SQuAD's questions"}


@dataclass(frozen=True)
class EvaluationTask:
    """A kind of prompt.

    Attributes:
        name: as given on the command line and written in results.
        description: one line for a reader.
        write: makes the draft of one prompt.
        is_number: the values are numbers, so that only digits count in teacher-forced scores.
        new_tokens: most tokens generated, as published; 0 for as many as the reference takes and a few more.
        match: how an answer is compared, see `Case`.
        needs: the user's text that the task needs, or None.
        ruler: one of RULER's.
    """

    name: str
    description: str
    write: Callable[[PromptRequest], PromptDraft]
    is_number: bool
    new_tokens: int = 0
    match: Match = "all"
    needs: Need | None = None
    ruler: bool = False


def _needles(name: str, description: str, needles: Needles) -> EvaluationTask:
    return EvaluationTask(
        name,
        description,
        partial(make_needles, needles=needles),
        is_number=needles.kind == "number",
        new_tokens=128,
        needs="prose" if needles.haystack == "prose" else None,
        ruler=True,
    )


def _calibrated(name: str, description: str, needs: Need | None = None) -> EvaluationTask:
    """Returns a task that calibration has too; here it draws from the evaluation pools."""

    def write(request: PromptRequest) -> PromptDraft:
        prompt = make_prompt(
            name, request.rng, "evaluation", request.tokenizer, request.length, request.resources.prose
        )
        return PromptDraft((prompt.user,), f"\n{prompt.prefix}", Answer.of(prompt.answer), (prompt.answer,))

    return EvaluationTask(name, description, write, is_number=True, needs=needs)


TASKS: dict[str, EvaluationTask] = {
    task.name: task
    for task in (
        _calibrated("needle-noise", "one needle in noise, the short answer alone"),
        _calibrated("needle-prose", "one needle in prose, the short answer alone", "prose"),
        _calibrated("multi-needle-noise", "four needles in noise, one asked for, the short answer alone"),
        _calibrated("multi-needle-prose", "four needles in prose, one asked for, the short answer alone", "prose"),
        _calibrated("key-value", "a JSON object of keys and numbers, one asked for"),
        _needles("niah-single-1", "RULER: one number in noise", Needles("noise")),
        _needles("niah-single-2", "RULER: one number in prose", Needles("prose")),
        _needles("niah-single-3", "RULER: one UUID in prose", Needles("prose", kind="uuid")),
        _needles("niah-multikey-1", "RULER: four numbers in prose, one asked for", Needles("prose", keys=4)),
        _needles("niah-multikey-2", "RULER: one number among others like it", Needles("needles")),
        _needles(
            "niah-multikey-3",
            "RULER: one UUID of a UUID among others like it",
            Needles("needles", key_kind="uuid", kind="uuid"),
        ),
        _needles("niah-multivalue", "RULER: four numbers of one key in prose", Needles("prose", values=4)),
        _needles("niah-multiquery", "RULER: four keys in prose, all asked for", Needles("prose", keys=4, queries=4)),
        EvaluationTask("vt", "RULER: variables of a chain of four hops", make_tracking, False, 30, ruler=True),
        EvaluationTask("cwe", "RULER: the ten common words of a list", make_common, False, 120, ruler=True),
        EvaluationTask("fwe", "RULER: the three most frequent coded words", make_frequent, False, 50, ruler=True),
        EvaluationTask(
            "qa-squad", "RULER: a SQuAD question among documents", make_question, False, 32, "any", "squad", True
        ),
        EvaluationTask("lines", "LongEval: the number of one line of a record", make_lines, True, 100, "last-integer"),
        EvaluationTask("recall", "pairs of words as plain text, then one key again", make_recall, False),
        EvaluationTask(
            "second-question", "a second needle asked for on a context already read", make_second_question, True
        ),
        EvaluationTask("legal-codes", "a reference code stated once in legal prose", make_legal_codes, False),
        EvaluationTask("table-lookup", "a cell of a table, by row and column", make_table_lookup, True),
        EvaluationTask("dialogue-fact", "a number that one of several speakers said once", make_dialogue_fact, True),
    )
}
GROUPS = ("ruler", "all")


def find_task(name: str) -> EvaluationTask:
    """Returns the task of that name.

    Raises:
        UsageError: unknown; names the nearest known one.
    """
    if name not in TASKS:
        hint = did_you_mean(name, (*TASKS, *GROUPS), f"known tasks are {', '.join((*TASKS, *GROUPS))}")
        raise UsageError(f"unknown task {name!r}; {hint}")
    return TASKS[name]


def expand_tasks(names: Iterable[str], resources: Resources | None = None) -> tuple[str, ...]:
    """Returns task names with groups expanded, each once: `ruler` is RULER's tasks, `all` those that can be made.

    Args:
        names: of tasks and groups.
        resources: what there is, for `all`.

    Raises:
        UsageError: unknown; names the nearest known one.
    """
    found: dict[str, None] = {}
    for name in names:
        if name == "all":
            found |= dict.fromkeys(task.name for task in TASKS.values() if _has(resources or Resources(), task))
        elif name == "ruler":
            found |= dict.fromkeys(task.name for task in TASKS.values() if task.ruler)
        else:
            found[find_task(name).name] = None
    return tuple(found)


def check_resources(names: Iterable[str], resources: Resources) -> None:
    """Checks that every task has the text it needs, before the first minute of work.

    Raises:
        UsageError: unknown task.
        DataError: text is missing, or the SQuAD file cannot be used; says which task needs what.
    """
    for task in map(find_task, names):
        if not _has(resources, task):
            need = task.needs or "prose"
            raise DataError(f"task {task.name} needs {_WHAT[need]}: {_HOW[need]}")
        if task.needs == "squad":
            _ = resources.questions


def _has(resources: Resources, task: EvaluationTask) -> bool:
    return task.needs is None or getattr(resources, task.needs) is not None


def make_cases(
    task: str,
    length: int,
    prompts: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    resources: Resources | None = None,
) -> list[Case]:
    """Returns evaluation prompts of a task; a larger number of them begins with those of a smaller one.

    Args:
        task: name of a task.
        length: tokens that prompt and generated answer may have.
        prompts: how many.
        seed: the same gives the same prompts.
        tokenizer: the model's.
        resources: texts that some tasks need.

    Raises:
        UsageError: unknown task.
        DataError: the length is too short for the task, or the text too short for the length or missing.
    """
    known, resources = find_task(task), resources or Resources()
    check_resources((task,), resources)
    return [_make_case(known, length, index, seed, tokenizer, resources) for index in range(prompts)]


def _make_case(
    task: EvaluationTask, length: int, index: int, seed: int, tokenizer: PreTrainedTokenizerBase, resources: Resources
) -> Case:
    rng = np.random.default_rng((seed, SPLITS.index("evaluation"), length, index))
    draft = task.write(PromptRequest(task.name, length, index, seed, rng, tokenizer, task.new_tokens, resources))
    ids = encode_draft(tokenizer, draft)
    return Case(
        task=task.name,
        length=length,
        prompt_ids=ids.prompt_ids,
        answer_ids=ids.answer_ids,
        is_value=ids.is_value,
        references=draft.references,
        match=task.match,
        new_tokens=task.new_tokens or len(ids.answer_ids) + ANSWER_ROOM,
        turn_at=ids.turn_at,
    )
