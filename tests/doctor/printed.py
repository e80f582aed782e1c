"""What a person sees of the tables of `doctor`."""

from __future__ import annotations

from typing import Any

from rich.console import Console


def shown(table: Any) -> str:
    """Returns a table as text."""
    console = Console(width=300)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
