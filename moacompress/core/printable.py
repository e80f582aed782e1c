"""Text that others wrote, as a terminal may be given it."""

from __future__ import annotations

_OBEYED = (*range(32), *range(127, 160), *range(0xD800, 0xE000))
_CONTROLS = {code: ascii(chr(code))[1:-1] for code in _OBEYED if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Returns text whose control characters, which a terminal would obey, are spelt out; ends of lines and tabs stay.

    So are halves of characters, which no terminal can be given.
    """
    return text.translate(_CONTROLS)
