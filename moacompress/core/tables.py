"""The look of all tables, and how numbers are written in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from moacompress.core.printable import printable

Row: TypeAlias = Mapping[str, Any]
"""One row of a result, as its JSON has it."""


def section(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Group:
    """Returns a titled table: the first column to the left, the others, numbers, to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row))
    return Group(Text(title, style="bold"), table)


def facts(title: str, rows: Mapping[str, str]) -> Group:
    """Returns titled lines of name and value."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
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
