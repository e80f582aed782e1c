"""How many pieces of filler a prompt takes to come near its length."""

from __future__ import annotations

from collections.abc import Callable

from moacompress.core.errors import DataError

_PROBE = 64
_GUESSES = 16
"""After so many guesses from the tokens per piece the rest is halved."""


def largest_fit(tokens: Callable[[int], int], length: int, limit: int, task: str) -> int:
    """Returns the largest number of filler pieces, up to `limit`, with which a prompt fits `length` tokens.

    `tokens` gives the tokens of a prompt with so many pieces, more with every piece. The tokens per piece, measured once, say
    where to look next, so a prompt is tokenized only a few times.

    Raises:
        DataError: it is too long without any filler.
    """
    low, low_tokens = 0, tokens(0)
    if low_tokens > length:
        raise DataError(f"a prompt of task {task} takes at least {low_tokens} tokens; {length} were asked for")
    high, high_tokens = limit + 1, 0  # the tokens are known once a prompt was too long
    probe = min(_PROBE, limit)
    slope = max((tokens(probe) - low_tokens) / max(probe, 1), 1.0)
    guesses = 0
    while high - low > 1:
        if high_tokens:
            slope = (high_tokens - low_tokens) / (high - low)
        guess = low + round((length - low_tokens) / slope) if guesses < _GUESSES else (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        size, guesses = tokens(guess), guesses + 1
        if size <= length:
            low, low_tokens = guess, size
        else:
            high, high_tokens = guess, size
    return low
