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


@dataclass(frozen=True)
class CellTable:
    """A table: what a row stands for, the columns, and the rows."""

    row: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def text(self, layout: TableLayout) -> str:
        """Returns the table as it is written in markdown or CSV."""
        lines: list[list[str]] = [[self.row, *self.columns], *([name, *map(str, cells)] for name, cells in self.rows)]
        if layout == "markdown":
            lines.insert(1, ["---"] * len(lines[0]))
        return "\n".join(_line(cells, layout) for cells in lines)

    def opening(self, layout: TableLayout, row: int, column: int) -> str:
        """Returns how a row is written up to a cell, both by their index: the cell's text follows without a space."""
        name, cells = self.rows[row]
        line = _line([name, *map(str, cells[:column]), "?"], layout)
        return line[: line.rindex("?")]


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

    def write(count: int) -> PromptDraft:
        before = round(depth * count)
        table = CellTable(subject.row, columns, (*others[:before], asked, *others[before:count]))
        return render(subject.title, table, layout, before, column)

    short = f"task {request.task} has {NAMES:,} names, too few for a prompt of {request.length:,} tokens"
    return request.fit(write, limit, short if limit == NAMES - 1 else None)


def _draw_rows(rng: np.random.Generator, count: int) -> list[Row]:
    """Returns rows of different names."""
    names, cells = draw_names(rng, count), rng.integers(*CELLS, (count, COLUMNS)).tolist()
    return [(name, tuple(row)) for name, row in zip(names, cells, strict=True)]


def render(title: str, table: CellTable, layout: TableLayout, row: int, column: int) -> PromptDraft:
    """Returns the prompt of a table in which the cell of `row` and `column`, by their index, is asked for."""
    name, cells = table.rows[row]
    user = TEMPLATE.format(title=title, context=table.text(layout), column=table.columns[column], name=name)
    opening, value = table.opening(layout, row, column), str(cells[column])
    space = " " if opening.endswith(" ") else ""
    return PromptDraft((user,), f"\n{opening.rstrip()}", Answer.of(value, before=space), (value,))
