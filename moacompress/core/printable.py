"""Text that others wrote, as a terminal may be given it."""

from __future__ import annotations

_CONTROLS = {code: ascii(chr(code))[1:-1] for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Returns text whose control characters, which a terminal would obey, are spelt out; ends of lines and tabs stay."""
    return text.translate(_CONTROLS)
