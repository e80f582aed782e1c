"""The registry of evaluation tasks: their names, what they need, and the prompts they make.

Prompts come from the pools that neither calibration nor validation draw from, say other sentences than theirs, and are the
same whatever models run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from moacompress.core.errors import DataError, UsageError, did_you_mean
from moacompress.core.files import fingerprint
from moacompress.core.plugins import TASKS as OUTSIDE
from moacompress.core.plugins import named_plugins
from moacompress.evaluation.tasks import ruler
from moacompress.evaluation.tasks.cases import Case
from moacompress.evaluation.tasks.counting import COMMON, FREQUENT, make_common, make_frequent
from moacompress.evaluation.tasks.document_question import make_question
from moacompress.evaluation.tasks.drafts import Answer, PromptDraft, encode_draft
from moacompress.evaluation.tasks.lookups import SAID, make_lines, make_recall
from moacompress.evaluation.tasks.needles import Needles, make_needles, make_second_question
from moacompress.evaluation.tasks.task import KINDS, EvaluationTask, Need, PromptRequest, Resources
from moacompress.evaluation.tasks.tracking import TRACKING, make_tracking
from moacompress.evaluation.tasks.unseen import (
    code_completion,
    code_question,
    dialogue_fact,
    legal_codes,
    table_lookup,
    tool_call,
)
from moacompress.evaluation.tasks.vocabulary import WORDS
from moacompress.prompts.generators import ANSWER_ROOM, EVALUATION_PAIRS, Values, make_prompt
from moacompress.prompts.pools import SPLITS
from moacompress.prompts.sentences import EVALUATION_DOCUMENTS, EVALUATION_NEEDLES, NeedleSentences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "GROUPS",
    "KINDS",
    "TASKS",
    "EvaluationTask",
    "Resources",
    "check_resources",
    "expand_tasks",
    "find_task",
    "known_tasks",
    "make_cases",
]


S = TypeVar("S")
_HOW = {"prose": "give a .txt file or a folder of them as text", "squad": "give a SQuAD file, such as dev-v2.0.json"}
_WHAT = {"prose": "prose", "squad": "SQuAD's questions"}
SHOWN_QUESTION = 300
"""Most characters of a question that a report keeps."""


def _calibrated(
    name: str, description: str, needs: Need | None = None, generator: str | None = None, values: Values = "numbers"
) -> EvaluationTask:
    """Returns a task that calibration has too; here it draws from the evaluation pools and says it in other words."""

    def write(request: PromptRequest) -> PromptDraft:
        prompt = make_prompt(
            generator or name,
            request.rng,
            "evaluation",
            request.tokenizer,
            request.length,
            request.resources.prose,
            values,
        )
        return PromptDraft((prompt.user,), f"\n{prompt.prefix}", Answer.of(prompt.answer), (prompt.answer,))

    return EvaluationTask(
        name, description, write, lambda: (EVALUATION_NEEDLES, EVALUATION_PAIRS), needs=needs, calibrated=True
    )


def _worded(
    name: str,
    description: str,
    make: Callable[[PromptRequest, S], PromptDraft],
    sentences: Callable[[], S],
    **options: Any,
) -> EvaluationTask:
    """Returns a task whose sentences are an argument of what makes its prompts; RULER's are read when a prompt is made."""
    return EvaluationTask(name, description, lambda request: make(request, sentences()), sentences, **options)


def _needles(
    name: str,
    description: str,
    needles: Needles,
    sentences: Callable[[], NeedleSentences] = lambda: EVALUATION_NEEDLES,
    **options: Any,
) -> EvaluationTask:
    return _worded(
        name,
        description,
        lambda request, said: make_needles(request, needles, said),
        sentences,
        needs="prose" if needles.haystack == "prose" else None,
        calibrated=True,
        **options,
    )


def _ruler(
    name: str,
    description: str,
    make: Callable[[PromptRequest, S], PromptDraft],
    sentences: Callable[[], S],
    new_tokens: int,
    **options: Any,
) -> EvaluationTask:
    return _worded(name, f"RULER: {description}", make, sentences, new_tokens=new_tokens, ruler=True, **options)


def _niah(name: str, description: str, needles: Needles) -> EvaluationTask:
    return _needles(name, f"RULER: {description}", needles, ruler.needles, new_tokens=128, ruler=True)


_UUIDS = Needles("needles", key_kind="uuid", kind="uuid")
_OURS = (
    _calibrated("needle-noise", "one needle in noise"),
    _calibrated("needle-prose", "one needle in prose", "prose"),
    _calibrated("needle-prose-uuids", "one UUID in prose", "prose", "needle-prose", "uuids"),
    _calibrated("multi-needle-noise", "four needles in noise, one asked for"),
    _calibrated("multi-needle-prose", "four needles in prose, one asked for", "prose"),
    _calibrated("key-value", "a JSON object of keys and numbers, one asked for"),
    _needles("needle-distractors", "one number among needles like it", Needles("needles")),
    _needles("needle-distractors-uuids", "one UUID of a UUID among needles like it", _UUIDS),
    _needles("multi-value-prose", "four numbers of one key in prose", Needles("prose", values=4)),
    _needles("multi-query-prose", "four keys in prose, all asked for", Needles("prose", keys=4, queries=4)),
    _worded("variable-chain", "variables of a chain of four hops", make_tracking, lambda: TRACKING),
    EvaluationTask(
        "common-words",
        "the ten common words of a list",
        lambda request: make_common(request, COMMON),
        lambda: (COMMON, WORDS),
    ),
    _worded("frequent-words", "the three most frequent words", make_frequent, lambda: FREQUENT),
    _worded(
        "document-question",
        "a SQuAD question among documents",
        make_question,
        lambda: EVALUATION_DOCUMENTS,
        new_tokens=32,
        match="any-words",
        needs="squad",
    ),
    EvaluationTask(
        "line-lookup",
        "the number of one line of a list, in a sentence",
        make_lines,
        lambda: SAID,
        new_tokens=40,
        match="last-integer",
    ),
    EvaluationTask("recall", "pairs of words as plain text, then one key again", make_recall, lambda: WORDS),
    EvaluationTask(
        "second-question",
        "a second needle asked for on a context already read",
        make_second_question,
        lambda: EVALUATION_NEEDLES,
    ),
    EvaluationTask(
        "legal-codes",
        "a reference code stated once in legal prose",
        legal_codes.make_legal_codes,
        lambda: legal_codes.SENTENCES,
    ),
    EvaluationTask(
        "table-lookup",
        "a cell of a table, by row and column",
        table_lookup.make_table_lookup,
        lambda: table_lookup.SENTENCES,
    ),
    EvaluationTask(
        "dialogue-fact",
        "a number that one of several speakers said once",
        dialogue_fact.make_dialogue_fact,
        lambda: dialogue_fact.SENTENCES,
    ),
    EvaluationTask(
        "code-completion",
        "a default in a module of functions, one of which is begun again",
        code_completion.make_code_completion,
        lambda: code_completion.SENTENCES,
    ),
    EvaluationTask(
        "code-question",
        "a question on the source of Python's standard library",
        code_question.make_code_question,
        code_question.code_sentences,
        match="any-words",
    ),
    EvaluationTask(
        "tool-call",
        "a tool to be called as JSON, with a number that a customer wrote",
        tool_call.make_tool_call,
        lambda: tool_call.SENTENCES,
        match="json",
    ),
)
_RULERS = (
    _niah("niah-single-1", "one number in noise", Needles("noise")),
    _niah("niah-single-2", "one number in prose", Needles("prose")),
    _niah("niah-single-3", "one UUID in prose", Needles("prose", kind="uuid")),
    _niah("niah-multikey-1", "four numbers in prose, one asked for", Needles("prose", keys=4)),
    _niah("niah-multikey-2", "one number among others like it", Needles("needles")),
    _niah("niah-multikey-3", "one UUID of a UUID among others like it", _UUIDS),
    _niah("niah-multivalue", "four numbers of one key in prose", Needles("prose", values=4)),
    _niah("niah-multiquery", "four keys in prose, all asked for", Needles("prose", keys=4, queries=4)),
    _ruler("vt", "variables of a chain of four hops", make_tracking, ruler.tracking, 30),
    _ruler("cwe", "the ten common words of a list", make_common, ruler.common_words, 120),
    _ruler("fwe", "the three most frequent coded words", make_frequent, ruler.frequent_words, 50),
    _ruler(
        "qa-squad", "a SQuAD question among documents", make_question, ruler.documents, 32, match="any", needs="squad"
    ),
)
TASKS: dict[str, EvaluationTask] = {task.name: task for task in (*_OURS, *_RULERS)}
"""Those of this package; see `known_tasks`."""
GROUPS = ("ruler", "all")


def known_tasks() -> dict[str, EvaluationTask]:
    """Returns all tasks by their names: ours, and those of installed packages (entry points of `moacompress.tasks`)."""
    return {**_installed_tasks(), **TASKS}


@functools.cache
def _installed_tasks() -> dict[str, EvaluationTask]:
    """Returns the tasks of installed packages; what is none, or has a name that is taken, is left out with a warning."""
    return named_plugins(
        OUTSIDE, "task", lambda given: isinstance(given, EvaluationTask), lambda name: name in (*TASKS, *GROUPS)
    )


def find_task(name: str, resources: Resources | None = None) -> EvaluationTask:
    """Returns the task of that name, one of the user's own rows first.

    Raises:
        UsageError: unknown; names the nearest known one.
    """
    known = {**known_tasks(), **({} if resources is None else resources.own)}
    if name not in known:
        hint = did_you_mean(name, (*known, *GROUPS), f"known tasks are {', '.join((*known, *GROUPS))}")
        raise UsageError(f"unknown task {name!r}; {hint}")
    return known[name]


def expand_tasks(names: Iterable[str], resources: Resources | None = None) -> tuple[str, ...]:
    """Returns task names with groups expanded, each once: `ruler` is RULER's tasks, `all` those that the resources allow.

    Raises:
        UsageError: unknown; names the nearest known one. Or one of RULER's whose sentences no installed package has.
    """
    found: dict[str, None] = {}
    for name in names:
        if name == "all":
            there = resources or Resources()
            found |= dict.fromkeys(task.name for task in known_tasks().values() if _can_be_made(there, task))
        elif name == "ruler":
            found |= dict.fromkeys(task.name for task in TASKS.values() if task.ruler)
        else:
            found[find_task(name, resources).name] = None
    for task in found:
        if find_task(task, resources).ruler:
            ruler.check_installed(task)
    return tuple(found)


def check_resources(names: Iterable[str], resources: Resources) -> None:
    """Checks that every task has the text and the sentences it needs, before the first minute of work.

    Raises:
        UsageError: unknown task, or one of RULER's whose sentences no installed package has.
        DataError: text is missing, or the SQuAD file cannot be used; says which task needs what.
    """
    for task in (find_task(name, resources) for name in names):
        if not _has(resources, task):
            need = task.needs or "prose"
            raise DataError(f"task {task.name} needs {_WHAT[need]}: {_HOW[need]}")
        if task.needs == "squad":
            _ = resources.questions
        _ = task.wording


def _has(resources: Resources, task: EvaluationTask) -> bool:
    return task.needs is None or getattr(resources, task.needs) is not None


def _can_be_made(resources: Resources, task: EvaluationTask) -> bool:
    return _has(resources, task) and (not task.ruler or ruler.is_installed())


def make_cases(
    task: str,
    length: int,
    prompts: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    resources: Resources | None = None,
) -> list[Case]:
    """Returns evaluation prompts of a task; a larger number of them begins with those of a smaller one.

    Prompt and generated answer have at most `length` tokens. Of prompts that are given the first ones that fit are taken,
    at most so many.

    Raises:
        UsageError: unknown task.
        DataError: the length is too short for the task, or the text too short for the length or missing.
    """
    resources = resources or Resources()
    known = find_task(task, resources)
    check_resources((task,), resources)

    def request(index: int) -> PromptRequest:
        rng = np.random.default_rng((seed, SPLITS.index("evaluation"), length, index))
        return PromptRequest(task, length, index, seed, rng, tokenizer, known.new_tokens, resources)

    if known.given is None:
        return [_make_case(known, request(index), known.write(request(index))) for index in range(prompts)]
    fitting = (draft for draft in known.given if request(0).tokens(draft) <= length)
    found = [_make_case(known, request(0), draft) for draft in islice(fitting, prompts)]
    if not found:
        raise DataError(f"no row of {task} fits into {length:,} tokens, its answer included; give longer --lengths")
    return found


def rows_left_out(
    task: str, length: int, prompts: int, tokenizer: PreTrainedTokenizerBase, resources: Resources
) -> tuple[int, int]:
    """Returns how many given prompts `make_cases` leaves out because they do not fit, and how many it looks at."""
    known, fitting, looked = find_task(task, resources), 0, 0
    rng = np.random.default_rng(0)
    request = PromptRequest(task, length, 0, 0, rng, tokenizer, known.new_tokens, resources)
    for draft in known.given or ():
        if fitting == prompts:
            break
        looked += 1
        fitting += request.tokens(draft) <= length
    return looked - fitting, looked


def _make_case(task: EvaluationTask, request: PromptRequest, draft: PromptDraft) -> Case:
    ids = encode_draft(request.tokenizer, draft)
    needed = len(ids.answer_ids) + ANSWER_ROOM
    return Case(
        task=task.name,
        length=request.length,
        references=draft.references,
        match=task.match,
        new_tokens=max(task.new_tokens, needed) if task.given is not None else task.new_tokens or needed,
        opening=draft.prefix,
        question=draft.asked[-SHOWN_QUESTION:],
        document=fingerprint(draft.document) if draft.document else "",
        **ids._asdict(),
    )
