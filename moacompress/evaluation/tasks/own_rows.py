"""Tasks of the user's own rows: a file or a hub set whose prompts have answers.

Rows are those that calibration takes (`moacompress.calibration.data.data_rows`), but here the answer is the row's and not the
dense model's: `prompt` or `context` with `question`, and `answer`, a text or a list of texts any of which is right; or
`messages` whose last turn is the assistant's.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from moacompress.calibration.data.data_rows import (
    DataRow,
    RowKind,
    field,
    read_rows,
    row_kind,
    rows_named,
    shown_value,
    source_name,
)
from moacompress.calibration.data.held_out import held_out_rows
from moacompress.core.errors import DataError, UsageError
from moacompress.core.loaded_rows import LOADERS
from moacompress.evaluation.tasks.drafts import Answer, PromptDraft
from moacompress.evaluation.tasks.registry import GROUPS, EvaluationTask, known_tasks
from moacompress.evaluation.tasks.task import TEXT, PromptRequest
from moacompress.prompts.sentences import EVALUATION_DOCUMENTS
from moacompress.recipe_sections import SourceRecipe

logger = logging.getLogger(__name__)

SENTENCE = 64
"""Tokens that an answer is given at least: models say in a sentence what a row says in a word."""


def own_tasks(names: Iterable[str], calibrated_on: Container[str] = ()) -> dict[str, EvaluationTask]:
    """Returns a task for each file or hub set, by its name: the file's without its ending.

    Args:
        names: files of rows, or hub ids.
        calibrated_on: of these, by path or by the path's last part, only the rows are taken that calibration holds out.

    Raises:
        UsageError: neither a file nor a hub id; or a name that a task has, or two of them.
        DataError: unreadable or empty; rows without an answer, or whose turns do not alternate, with the number of the row.
    """
    found: dict[str, EvaluationTask] = {}
    for name in names:
        task = _own_task(name, name in calibrated_on or Path(name).name in calibrated_on)
        if task.name in (*found, *known_tasks(), *GROUPS, TEXT):
            raise UsageError(f"{name} would be the task {task.name}, which there is already; rename it")
        found[task.name] = task
    return found


def answered_sources(sources: Iterable[SourceRecipe]) -> list[str]:
    """Returns the sources of a calibration whose rows have answers, so that those which are held out can be evaluated.

    Of one without answers it is said that it is not.

    Raises:
        UsageError: one has the name of a task.
        DataError: one has too few rows to hold some out.
    """
    found = []
    for source in sources:
        name = source.dataset or source.path
        if name is None or row_kind(read_rows(source), source_name(source)) == "text":
            continue
        try:
            own_tasks([name])
        except DataError as error:
            logger.warning("rows of %s that are held out are not evaluated: %s", source_name(source), error)
            continue
        own_tasks([name], (name,))
        found.append(name)
    return found


def _own_task(place: str, held_out: bool) -> EvaluationTask:
    source = rows_named(place)
    if source is None:
        raise UsageError(
            f"source {place!r} is no file ({', '.join(LOADERS)}) and no hub id; of what is a task give --tasks"
        )
    where = source_name(source)
    rows = read_rows(source)
    kind = row_kind(rows, where)
    if kind == "text":
        raise DataError(f"{where} is plain text, which has no answers; give it as --text, and the task text")
    taken = held_out_rows(rows, kind, where) if held_out else range(len(rows))
    given = tuple(_draft(rows[index], kind, where, index) for index in taken)
    stem = place.rpartition("/")[2] if source.dataset is not None else Path(place).stem
    name = re.sub(r"[^\w.-]+", "-", stem)

    def write(request: PromptRequest) -> PromptDraft:
        return given[request.index]

    return EvaluationTask(
        name,
        f"the rows of {where}" + (" that were held out" if held_out else ""),
        write,
        lambda: tuple((draft.system, draft.messages, draft.references) for draft in given),
        new_tokens=SENTENCE,
        match="any-words",
        given=given,
    )


def _draft(row: DataRow, kind: RowKind, where: str, index: int) -> PromptDraft:
    if kind == "messages":
        return _conversation(row, where, index)
    references = _references(row, where, index)
    if kind == "question":
        question = field(row, "question", where, index)
        context = field(row, "context", where, index)
        user = EVALUATION_DOCUMENTS.render([context], question)
        draft = _answered((user,), EVALUATION_DOCUMENTS.answer, references)
        return replace(draft, question=EVALUATION_DOCUMENTS.asks(question), document=context)
    return _answered((field(row, "prompt", where, index),), "", references)


def _answered(messages: tuple[str, ...], prefix: str, references: tuple[str, ...], system: str = "") -> PromptDraft:
    space = "" if (prefix or messages[-1])[-1:].isspace() else " "
    # a prefix that is white space alone stands between a base model's prompt and the answer; a template ends by itself
    if not prefix:
        return PromptDraft(messages, space, Answer.of(references[0], before=""), references, system=system)
    return PromptDraft(messages, prefix, Answer.of(references[0], before=space), references, system=system)


def _references(row: DataRow, where: str, index: int) -> tuple[str, ...]:
    value = row.get("answer")
    texts: Sequence[object] = value if isinstance(value, list | tuple) else [value]
    given = tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())
    if not given or len(given) != len(texts):
        raise DataError(
            f"row {index} of {where} has no answer to measure against but {shown_value(value)}; give every row `answer`, a "
            "text or a list of texts any of which is right"
        )
    return given


def _conversation(row: DataRow, where: str, index: int) -> PromptDraft:
    turns = row.get("messages")
    said = [(turn.get("role"), turn.get("content")) for turn in turns or () if isinstance(turn, dict)]
    system = str(said.pop(0)[1] or "") if said and said[0][0] == "system" else ""
    roles = [role for role, _ in said]
    alternate = roles == ["user", "assistant"] * (len(roles) // 2) and roles
    if not alternate or not all(isinstance(text, str) and text.strip() for _, text in said):
        raise DataError(
            f"row {index} of {where} needs turns of user and assistant in turn under `messages`, the assistant's last, and "
            f"before them at most one of the system; it has the roles {', '.join(map(str, roles)) or '(none)'}"
        )
    *messages, answer = (str(text) for _, text in said)
    return _answered(tuple(messages), "", (answer.strip(),), system)
