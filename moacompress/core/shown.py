"""Values that a notebook shows as tables. How they look is the report's to say, which is above all that make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

_forms: dict[str, Callable[[Shown], str]] = {}
"""Writes a value as "html" and as "text"."""


def show_with(html: Callable[[Shown], str], text: Callable[[Shown], str]) -> None:
    """Sets how all values are shown from now on; what `report.notebook` does when the package is imported."""
    _forms.update(html=html, text=text)


class Printer(Protocol):
    """What of IPython's printer is called."""

    def text(self, obj: str) -> None:
        """Writes a text."""


class Shown:
    """A value that a notebook shows as the tables of its command, and IPython in a terminal as their text."""

    def _repr_html_(self) -> str:
        return _forms["html"](self)

    def _repr_pretty_(self, printer: Printer, cycle: bool) -> None:
        printer.text(_forms["text"](self))


class ShownDict(Shown, dict[str, Any]):
    """A dict that a notebook shows as tables; to everything else it is a dict, and as JSON what `--json` writes."""
