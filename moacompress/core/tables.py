"""The look of all tables, and how numbers are written in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap
from typing import Any, TypeAlias

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from moacompress.core.printable import printable

Row: TypeAlias = Mapping[str, Any]
"""One row of a result, as its JSON has it."""
MIN_WIDTH = 8
"""Characters to which a heading may be wrapped above shorter cells."""


class Section:
    """A titled table: the first column to the left, the others, numbers, to the right.

    Where it is wider than the console, headings are wrapped, and columns that still have no room follow in a table of their
    own, whose first column is repeated: no number is broken over two lines.
    """

    def __init__(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        self.title, self.columns = title, tuple(columns)
        self.rows = [(*row, *[""] * (len(self.columns) - len(row))) for row in rows]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.title, style="bold")
        numbers = range(1, len(self.columns))
        whole = self._table((0, *numbers), self.columns)
        if self._fits(whole, console, options):
            yield whole
            return
        widths = [max((cell_len(printable(row[index])) for row in self.rows), default=0) for index in (0, *numbers)]
        heads = ["\n".join(wrap(name, max(width, MIN_WIDTH))) for name, width in zip(self.columns, widths, strict=True)]
        shown: tuple[int, ...] = (0,)
        for index in numbers:
            if len(shown) > 1 and not self._fits(self._table((*shown, index), heads), console, options):
                yield self._table(shown, heads)
                shown = (0,)
            shown = (*shown, index)
        yield self._table(shown, heads)

    def _fits(self, table: Table, console: Console, options: ConsoleOptions) -> bool:
        unlimited = options.update_width(10_000)
        return Measurement.get(console, unlimited, table).maximum <= options.max_width

    def _table(self, shown: Sequence[int], heads: Sequence[str]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for index in shown:
            table.add_column(heads[index], justify="right" if index else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(_cell(row[index]) for index in shown))
        return table


def section(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Section:
    """Returns a titled table; see `Section`."""
    return Section(title, columns, rows)


def facts(title: str, rows: Mapping[str, str]) -> Group:
    """Returns titled lines of name and value."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a path is longer than a line
    for name, value in rows.items():
        table.add_row(_cell(name), _cell(value))
    return Group(Text(title, style="bold"), table, "")


def _cell(text: str) -> Text:
    return Text(printable(text))


def readable_bytes(count: int) -> str:
    """Returns `24.0 MiB` for 25165824."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def readable_types(sizes: Mapping[str, int]) -> str:
    """Returns `Q4_1 48.0 MiB, bfloat16 1.0 KiB` for bytes by types, the largest first."""
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {readable_bytes(size)}" for kind, size in ordered)


def readable_number(value: float | None, form: str = ".3g") -> str:
    """Returns the number in a format, `-` for None."""
    return "-" if value is None else format(value, form)


def readable_seconds(seconds: float) -> str:
    """Returns `42 s`, `12 min` or `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
