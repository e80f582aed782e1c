"""How many cache blocks the tokens take that gates select of a sequence, and who lies where; no vLLM is needed here.

A block has room for several units: 16 places of one KV head each. Units are given out in the order in which KV heads need them
as a sequence grows. How many tokens are selected follows from the number of tokens alone, so that order does, and no room
waits for a KV head that selects fewer than another.
"""

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

    Args:
        rules: of each KV head the numbers of its `Span`, `select_alpha` and `select_beta_q`.
        per_block: units in a block.
    """

    def __init__(self, rules: Iterable[tuple[int, ...]], per_block: int) -> None:
        columns = np.array([*rules], np.int64).T[:, None, :]
        self._span, self._select, self._per_block = Span(*columns[:-2]), columns[-2:], per_block
        self._pages: dict[int, Ints] = {}

    def held(self, n: int) -> int:
        """Returns the blocks of a sequence of `n` tokens, whose next one attends to what has left its window."""
        page, index = divmod(n, _PAGE)
        found = self._pages.get(page)
        if found is None:
            found = self._pages[page] = -(-self._units(page).sum(1) // self._per_block)
        return int(found[index])

    def most_held(self, n: int, in_flight: int) -> int:
        """Returns the most blocks while `n` tokens are computed: those at their end, however many are computed at a time."""
        return self.held(n)

    def units(self, longest: int) -> list[Ints]:
        """Returns the units of each KV head in sequences of up to `longest` tokens, by their places.

        Unit u is the one numbered `u % per_block` in the block `u // per_block`.
        """
        before, given = np.zeros((1, self._span.sink.shape[1]), np.int64), [np.zeros(0, np.int64)]
        for page in range(longest // _PAGE + 1):
            units = self._units(page)[: longest + 1 - page * _PAGE]
            more = np.diff(units, axis=0, prepend=before)
            given.append(np.repeat(np.nonzero(more)[1], more[more > 0]))
            before = units[-1:]
        owners = np.concatenate(given)
        return [np.flatnonzero(owners == head) for head in range(before.shape[1])]

    def _units(self, page: int) -> Ints:
        """Returns the units that each KV head needs at some numbers of tokens, `[numbers, heads]`."""
        tokens = np.arange(page * _PAGE, (page + 1) * _PAGE, dtype=np.int64)[:, None]
        places: Ints = selected(tokens_left(tokens + 1, self._span), *self._select)
        return -(-places // BLOCK)


@lru_cache(maxsize=1024)
def selected_blocks(rules: tuple[tuple[int, ...], ...], per_block: int) -> SelectedBlocks:
    """Returns the `SelectedBlocks` of some rules, made once."""
    return SelectedBlocks(rules, per_block)
