"""Text that others wrote, as a terminal may be given it."""

from __future__ import annotations

_DIRECTIONS = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))  # by which text shows as another
_OBEYED = (*range(32), *range(127, 160), *_DIRECTIONS, *range(0xD800, 0xE000))
_CONTROLS = {code: ascii(chr(code))[1:-1] for code in _OBEYED if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Returns text whose control characters, which a terminal would obey, are spelt out; ends of lines and tabs stay.

    So are halves of characters, which no terminal can be given, and marks that turn the direction of text around them.
    """
    return text.translate(_CONTROLS)
