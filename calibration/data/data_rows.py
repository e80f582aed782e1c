"""Rows of data: local files and hub sets, read into mappings with `messages`, `prompt`, a question or `text`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from moacompress.core.errors import DataError
from moacompress.core.files import canonical_json
from moacompress.core.loaded_rows import LOADERS, file_rows, hub_rows, read_once
from moacompress.core.shingles import normalised, text_hash
from moacompress.prompts.pools import Split, deal, read_files
from moacompress.prompts.squad import parse_articles
from moacompress.recipe_sections import SourceRecipe

DataRow = Mapping[str, Any]
RowKind = Literal["messages", "prompt", "question", "text"]
COLUMNS: dict[RowKind, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt",),
    "question": ("context", "question"),
    "text": ("text",),
}
"""The columns that each kind of row has, the first kind that fits counts."""
ARTICLE = "article"
"""Column with the number of a question's article, of rows from a file in SQuAD's form."""
_SHARES: dict[Split, int] = {"calibration": 2, "validation": 1, "evaluation": 1}
"""One row in four is for validation, and one is held out: a plan is evaluated on it."""


def rows_named(name: str) -> SourceRecipe | None:
    """Returns the source that a name stands for: a file or folder, or a hub set; None where it is neither."""
    if Path(name).suffix in LOADERS or Path(name).exists():
        return SourceRecipe(path=name)
    return SourceRecipe(dataset=name) if "/" in name else None


def read_rows(source: SourceRecipe) -> Sequence[DataRow]:
    """Returns the rows of a source that names a file or a hub set; a local row that repeats an earlier one is left out.

    Raises:
        DataError: missing, unreadable, malformed, or empty.
    """
    if source.dataset is not None:
        rows: Sequence[DataRow] = hub_rows(source.dataset, source.config, source.split)
    else:
        rows = _read_local(Path(str(source.path)))
    if not len(rows):
        raise DataError(f"{source_name(source)} has no rows")
    return rows


def source_name(source: SourceRecipe) -> str:
    """Returns what samples of a file or a hub set are called."""
    return f"hub:{source.dataset}" if source.dataset is not None else f"file:{Path(str(source.path)).name}"


def row_kind(rows: Sequence[DataRow], name: str) -> RowKind:
    """Returns which columns the rows are read by.

    Raises:
        DataError: no row has one that is known.
    """
    found = next((kind for kind, columns in COLUMNS.items() if all(column in rows[0] for column in columns)), None)
    if found is None:
        raise DataError(
            f"{name} has the columns {', '.join(sorted(rows[0])) or '(none)'}; rows need `messages`, `prompt` (and "
            "optionally `answer`), `context` with `question`, or `text`"
        )
    return found


def split_rows(rows: Mapping[int, int], split: Split, name: str) -> list[int]:
    """Returns the indices of a split's rows, which they are in by their hash; see `_SHARES`.

    `rows` are what `first_of_each` returns.

    Raises:
        DataError: too few rows to have some in each.
    """
    pools = deal(list(rows.values()), _SHARES, name, "rows")
    return [index for index, pool in zip(rows, pools, strict=True) if pool == split]


def rows_for(wanted: Mapping[Split, int]) -> int:
    """Returns about how many rows a source must have, by `_SHARES`, for each split to get as many as are wanted."""
    return max(math.ceil(count * sum(_SHARES.values()) / _SHARES[split]) for split, count in wanted.items())


def first_of_each(rows: Sequence[DataRow], kind: RowKind, name: str) -> dict[int, int]:
    """Returns the hash of what makes a sample of each row, by its index: of several with one prompt of the first alone.

    Prompts are compared in their normal form (`core.shingles`). The answers of rows are not used for calibration, so rows of
    one prompt make one sample, which must not be in two splits.
    """
    if isinstance(rows, list):
        read: Iterable[DataRow] = rows
    else:  # of a hub set the other columns need not be read
        read = rows.select_columns(list(COLUMNS[kind])) if hasattr(rows, "select_columns") else rows
    first: dict[int, int] = {}
    for index, row in enumerate(read):
        first.setdefault(text_hash(_used(row, kind, name, index)), index)
    return {index: key for key, index in first.items()}


def _used(row: DataRow, kind: RowKind, name: str, index: int) -> str:
    """Returns what of a row goes into a sample; of a damaged one anything of its own."""
    try:
        if kind == "messages":
            return canonical_json(conversation(row, name, index))
        return field(row, COLUMNS[kind][0], name, index)
    except DataError:
        return f"row {index}"


def field(row: DataRow, column: str, name: str, index: int) -> str:
    """Returns a row's text.

    Raises:
        DataError: the row lacks the column or it holds no text.
    """
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"row {index} of {name} has no text under {column!r} but {shown_value(value)}")
    return value


def conversation(row: DataRow, name: str, index: int) -> list[dict[str, str]]:
    """Returns a row's turns up to where the assistant answers last; its own last answer is left out.

    Raises:
        DataError: not turns with a role and a text, or no turn before the answer.
    """
    turns = row.get("messages")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f"row {index} of {name} has no list of turns under 'messages' but {shown_value(turns)}")
    messages = []
    for number, turn in enumerate(turns):
        role, content = turn.get("role"), turn.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"turn {number} of row {index} of {name} needs a role and a content, both texts")
        messages.append({"role": role, "content": content})
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        raise DataError(f"row {index} of {name} has no user turn before the assistant's last answer")
    return messages


@read_once
def _read_local(path: Path) -> Sequence[DataRow]:
    if path.suffix == ".txt" or path.is_dir():
        return [{"text": text} for text in read_files(path).values()]
    if path.suffix not in LOADERS:
        raise DataError(f"{path} is no {', '.join(LOADERS)} file and no folder of .txt files")
    rows = file_rows(LOADERS[path.suffix], path)
    if len(rows) == 1 and "data" in rows[0] and not any(set(columns) <= set(rows[0]) for columns in COLUMNS.values()):
        rows = _squad_rows(rows[0], path)
    first: dict[str, DataRow] = {}
    for row in rows:
        first.setdefault(repr(_comparable(row)), row)
    return list(first.values())


def _comparable(value: Any) -> Any:
    """Returns a row with all its texts in their normal form."""
    if isinstance(value, Mapping):
        return {key: _comparable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_comparable(item) for item in value]
    return normalised(value) if isinstance(value, str) else value


def _squad_rows(data: Any, path: Path) -> list[Any]:
    return [
        {"context": paragraph.context, "question": asked.text, "answer": list(asked.answers), ARTICLE: number}
        for number, article in enumerate(parse_articles(data, path))
        for paragraph in article
        for asked in paragraph.questions
    ]


def shown_value(value: Any) -> str:
    """Returns what stands where a text was looked for, in few characters."""
    if isinstance(value, datetime):
        return f"the date {value:%Y-%m-%d}; of JSON dates are not kept as they are written, so give the rows as .csv"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
