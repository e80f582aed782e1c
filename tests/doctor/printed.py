"""What a person sees of the tables of `doctor`."""

from __future__ import annotations

from typing import Any

from tests.printed import printed


def shown(table: Any) -> str:
    """Returns a table as text."""
    return printed(table, width=300)
