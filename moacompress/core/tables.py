"""Tables as data, for terminals, Markdown and HTML, and how numbers are written in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any, TypeAlias

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from moacompress.core.printable import printable

Row: TypeAlias = Mapping[str, Any]
"""One row of a result, as its JSON has it."""
Columns: TypeAlias = dict[str, Callable[[Any], str]]
"""Headings, each with the text of a row's cell."""
MIN_WIDTH = 8
"""Characters to which a heading may be wrapped above shorter cells."""


class Table:
    """A titled table whose cells are text.

    A console that is too narrow for it shows wrapped headings, and the columns that still have no room in a table of their own,
    whose first column is repeated: no number is broken over two lines.
    """

    def __init__(
        self,
        title: str,
        columns: Sequence[str],
        rows: Iterable[Sequence[str]],
        note: str = "",
        text_columns: int = 1,
    ) -> None:
        """Makes a table; a row may lack cells at its end.

        Args:
            title: above it.
            columns: headings; rows without any are names with their values.
            rows: cells.
            note: below it.
            text_columns: how many columns from the left are text; the others are numbers, aligned right.
        """
        self.title, self.columns, self.note, self.text_columns = title, tuple(columns), note, text_columns
        self.rows = [(*row, *[""] * (len(self.columns) - len(row))) for row in rows]

    @staticmethod
    def of(title: str, columns: Columns, rows: Iterable[Any], note: str = "", text_columns: int = 1) -> Table:
        """Returns the table of values, a row each, in which every heading has the function that writes its cells."""
        cells = [[write(row) for write in columns.values()] for row in rows]
        return Table(title, tuple(columns), cells, note, text_columns)

    def markdown(self) -> str:
        """Returns the table as Markdown with its note; its title is that of the section that it stands in."""
        aligned = ["---" if index < self.text_columns else "---:" for index in range(len(self.columns))]
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in (self.columns, aligned, *self.rows)]
        return "\n".join(f"| {' | '.join(row)} |" for row in escaped) + (f"\n\n{self.note}" if self.note else "")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.title, style="bold")
        yield from self._parts(console, options) if self.columns else (self._facts(), "")
        if self.note:
            yield Text(printable(self.note))

    def _parts(self, console: Console, options: ConsoleOptions) -> Iterator[RichTable]:
        """Yields the table in as many parts as the console is too narrow for it."""

        def fits(part: RichTable) -> bool:
            return Measurement.get(console, options.update_width(10_000), part).maximum <= options.max_width

        numbers = range(1, len(self.columns))
        whole = self._part((0, *numbers), self.columns)
        if fits(whole):
            yield whole
            return
        widths = [max((cell_len(printable(row[index])) for row in self.rows), default=0) for index in (0, *numbers)]
        heads = ["\n".join(wrap(name, max(width, MIN_WIDTH))) for name, width in zip(self.columns, widths, strict=True)]
        shown: tuple[int, ...] = (0,)
        for index in numbers:
            if len(shown) > 1 and not fits(self._part((*shown, index), heads)):
                yield self._part(shown, heads)
                shown = (0,)
            shown = (*shown, index)
        yield self._part(shown, heads)

    def _part(self, shown: Sequence[int], heads: Sequence[str]) -> RichTable:
        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
        for index in shown:
            justify: JustifyMethod = "left" if index < self.text_columns else "right"
            table.add_column(heads[index], justify=justify, overflow="fold")
        for row in self.rows:
            table.add_row(*(_cell(row[index]) for index in shown))
        return table

    def _facts(self) -> RichTable:
        table = RichTable(show_header=False, box=None, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")  # a path is longer than a line
        for name, value in self.rows:
            table.add_row(_cell(name), _cell(value))
        return table


def facts(title: str, rows: Mapping[str, str]) -> Table:
    """Returns the table of names and values, which has no headings."""
    return Table(title, (), rows.items())


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


def rounded_text(value: float, form: str) -> str:
    """Returns a number with so many more digits as tell it from 0 and 1: 0.996 is not `1.00`, nor 0.9996 `100%`."""
    digits, kind = int(form[1:-1]), form[-1]
    for more in range(digits, digits + 4):
        text = format(value, f".{more}{kind}")
        if not any(text.lstrip("-") == format(whole, f".{more}{kind}") for whole in (0.0, 1.0) if value != whole):
            return text
    return text


def estimate_text(value: float | None, interval: Sequence[float] | None, form: str = ".2f", mark: str = "") -> str:
    """Returns `0.95 [0.87, 0.99]`, the value alone where there is no interval, and `-` where there is no value.

    The value is written as `rounded_text` does unless the form has a sign; `mark` stands behind it.
    """
    if value is None:
        return "-"
    text = (format(value, form) if form.startswith("+") else rounded_text(value, form)) + mark
    if interval is None:
        return text
    low, high = (format(end, form) for end in interval)
    return f"{text} [{low}, {high}]"


def error_text(value: float | None, error: float | None, form: str = ".4g") -> str:
    """Returns `0.0123 ± 0.002`, a mean and its standard error; of a single unit, which has none, the value alone."""
    text = readable_number(value, form)
    return text if value is None or error is None else f"{text} ± {error:.2g}"


def p_text(p: float) -> str:
    """Returns `p .03`, or `p < .001`."""
    return "p < .001" if p < 0.001 else f"p {p:.2g}".replace("0.", ".", 1)
