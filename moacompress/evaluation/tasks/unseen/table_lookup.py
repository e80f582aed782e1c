"""A long table of several columns, as markdown or CSV, of which one cell is asked for by its row and its column.

The answer begins with the row as far as it is before that cell, which is never the first: asked in a sentence, a small model
takes any number of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moacompress.evaluation.tasks.drafts import Answer, PromptDraft
from moacompress.evaluation.tasks.task import PromptRequest
from moacompress.evaluation.tasks.unseen.names import NAMES, draw_names

TableLayout = Literal["markdown", "csv"]
Row = tuple[str, tuple[int, ...]]
"""A row's name and its cells."""
LAYOUTS: tuple[TableLayout, ...] = ("markdown", "csv")
COLUMNS = 3
ROW_TOKENS = 8
"""No row has fewer tokens, a token for each cell, comma and end of line included: how many are drawn at most."""
FIRST_ROW_TOKENS = 16
"""Tokens of a row of most tokenizers at least: how many rows are drawn first, and the others after all else.

All that is drawn depends on how many the first ones are, so another number gives other prompts.
"""
CELLS = (1000, 10_000)
"""The cells are integers from the first up, below the second."""
TEMPLATE = (
    "Here is a table of {title}.\n\n{context}\n\nIn the table above, what is the {column} of {name}? Repeat its row up "
    "to there."
)


@dataclass(frozen=True)
class Subject:
    """What a table is about: its title, what a row stands for, and the columns there may be."""

    title: str
    row: str
    columns: tuple[str, ...]


SUBJECTS = (
    Subject("towns", "town", ("population", "elevation", "rainfall", "area", "budget", "founding year")),
    Subject("ships", "ship", ("tonnage", "length", "crew", "range", "cargo", "horsepower")),
    Subject("employees", "surname", ("salary", "badge", "bonus", "mileage", "pension", "overtime")),
    Subject("farms", "farm", ("acreage", "yield", "livestock", "rent", "turnover", "subsidy")),
)


SENTENCES = (TEMPLATE, SUBJECTS)
"""All that prompts say but for what is drawn."""


def _line(cells: Sequence[str], layout: TableLayout) -> str:
    return ",".join(cells) if layout == "csv" else f"| {' | '.join(cells)} |"


def make_table_lookup(request: PromptRequest) -> PromptDraft:
    """Returns a table of different rows, one cell of which is asked for.

    Raises:
        DataError: the length is too short, or too long for the names there are.
    """
    rng = request.rng
    subject, layout = SUBJECTS[int(rng.integers(len(SUBJECTS)))], LAYOUTS[int(rng.integers(len(LAYOUTS)))]
    columns = tuple(subject.columns[index] for index in rng.permutation(len(subject.columns))[:COLUMNS])
    limit, first = (min(request.length // tokens, NAMES - 1) for tokens in (ROW_TOKENS, FIRST_ROW_TOKENS))
    asked, *others = _draw_rows(rng, first + 1)
    depth, column = float(rng.random()), int(rng.integers(1, COLUMNS))
    taken = {name for name, _ in (asked, *others)}
    others += [row for row in _draw_rows(rng, limit + 1) if row[0] not in taken]

    name, cells = asked
    line = _line([name, *map(str, cells[:column]), "?"], layout)
    opening, value = line[: line.rindex("?")], str(cells[column])
    answer = Answer.of(value, before=" " if opening.endswith(" ") else "")

    def write(count: int) -> PromptDraft:
        before = round(depth * count)
        rows = (*others[:before], asked, *others[before:count])
        lines = [[subject.row, *columns], *([name, *map(str, cells)] for name, cells in rows)]
        if layout == "markdown":
            lines.insert(1, ["---"] * len(lines[0]))
        context = "\n".join(_line(cells, layout) for cells in lines)
        user = TEMPLATE.format(title=subject.title, context=context, column=columns[column], name=name)
        return PromptDraft((user,), f"\n{opening.rstrip()}", answer, (value,))

    short = f"task {request.task} has {NAMES:,} names, too few for a prompt of {request.length:,} tokens"
    return request.fit(write, limit, short if limit == NAMES - 1 else None)


def _draw_rows(rng: np.random.Generator, count: int) -> list[Row]:
    """Returns rows of different names."""
    names, cells = draw_names(rng, count), rng.integers(*CELLS, (count, COLUMNS)).tolist()
    return [(name, tuple(row)) for name, row in zip(names, cells, strict=True)]
