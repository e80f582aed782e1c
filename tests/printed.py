"""What a person sees of tables."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console


def printed(*parts: Any, width: int = 100, **options: Any) -> str:
    """Returns tables, and texts between them, as a console of some width shows them."""
    file = io.StringIO()
    console = Console(file=file, width=width, highlight=False, **options)
    for part in parts:
        console.print(part, markup=False)
    return file.getvalue()
