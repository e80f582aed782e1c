"""How many cache blocks the tokens take that gates select of a sequence; no vLLM is needed here."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from moacompress.core.arrays import Ints
from moacompress.rules.windows import BLOCK, Span, selected, tokens_left

_PAGE = 1024
"""Numbers of tokens that are looked at together."""


class SelectedBlocks:
    """Blocks of KV heads that share a block table, for the tokens that their gates select; none is given back before the end.

    Who is selected follows from scores, and how many are from the number of tokens alone.
    """

    def __init__(self, rules: Iterable[tuple[int, ...]]) -> None:
        """Takes the different rules of the KV heads, as the numbers of a `Span`, `select_alpha` and `select_beta_q`."""
        columns = np.array([*rules], np.int64).T[:, None, :]
        self._span, self._select = Span(*columns[:-2]), columns[-2:]
        self._pages: dict[int, Ints] = {}

    def held(self, n: int) -> int:
        """Returns the blocks of a sequence of `n` tokens, whose next one attends to what has left its window."""
        page, index = divmod(n, _PAGE)
        found = self._pages.get(page)
        if found is None:
            tokens = np.arange(page * _PAGE, (page + 1) * _PAGE, dtype=np.int64)[:, None]
            most = selected(tokens_left(tokens + 1, self._span), *self._select).max(1)
            found = self._pages[page] = -(-most // BLOCK)
        return int(found[index])

    def most_held(self, n: int, in_flight: int) -> int:
        """Returns the most blocks while `n` tokens are computed: those at their end, however many are computed at a time."""
        return self.held(n)


@lru_cache(maxsize=1024)
def selected_blocks(rules: tuple[tuple[int, ...], ...]) -> SelectedBlocks:
    """Returns the `SelectedBlocks` of some rules, made once."""
    return SelectedBlocks(rules)
