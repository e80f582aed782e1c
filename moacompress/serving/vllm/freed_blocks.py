"""Which cache blocks of a sequence no rule of a class of KV heads sees any more; no vLLM is needed here."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from moacompress.core.arrays import Ints
from moacompress.rules.windows import BLOCK, Span, block_runs

_PAGE = 1024
"""Numbers of tokens that are looked at together."""


class Freed(NamedTuple):
    """Blocks of a sequence that are not seen any more: `[0, front)` and `[gap, gap_end)`; what is freed stays freed.

    Attributes:
        front: end of the blocks that a layer's own sliding window has left behind.
        gap: end of the sinks' blocks.
        gap_end: first block of the widest window, `gap` at least.
    """

    front: int
    gap: int
    gap_end: int

    def count(self, blocks: int) -> int:
        """Returns how many of the first `blocks` blocks of a sequence they are."""
        gap = max(min(self.gap_end, blocks) - min(max(self.gap, self.front), blocks), 0)
        return min(self.front, blocks) + gap

    def holds(self, block: int) -> bool:
        """Whether a block is one of them."""
        return block < self.front or self.gap <= block < self.gap_end


class FreedBlocks:
    """What is freed as sequences grow, of KV heads that share a block table."""

    def __init__(self, spans: Iterable[tuple[int, ...]]) -> None:
        """Takes the different spans of the KV heads, as tuples of the numbers of a `Span`; their native window is one."""
        columns = np.array([*spans], np.int64).T
        self._span = Span(*columns[:, None, :])
        self._native = int(columns[-1, 0])
        self._pages: dict[int, Ints] = {}

    def at(self, n: int) -> Freed:
        """Returns what the query at position `n - 1`, and every later one, does not see."""
        page, index = divmod(n, _PAGE)
        found = self._pages.get(page)
        if found is None:
            tokens = np.arange(page * _PAGE, (page + 1) * _PAGE, dtype=np.int64)[:, None]
            (front, sinks), (window, _) = block_runs(tokens, self._span)
            gap = sinks.max(1)
            found = np.stack((front.min(1), gap, np.maximum(window.min(1), gap)), 1)
            self._pages[page] = found
        return Freed(*found[index].tolist())

    def held(self, n: int) -> int:
        """Returns the blocks that are held of a sequence of `n` tokens, when its last one is attended from."""
        blocks = -(-n // BLOCK)
        return blocks - self.at(n).count(blocks)

    def most_held(self, n: int, in_flight: int) -> int:
        """Returns the most blocks that are held while `n` tokens are computed, `in_flight` of them at a time at most.

        What a step computes has its blocks before anything that it leaves behind is freed. Blocks held grow with the tokens
        computed, give or take one for where in its block a step begins, until a layer's own window leaves the sinks behind.
        """
        last = max(n - in_flight, 0)
        return max(self._while_computed(done, n, in_flight) for done in {last, min(last, self._native)})

    def _while_computed(self, done: int, n: int, in_flight: int) -> int:
        blocks = -(-min(done + in_flight, n) // BLOCK)
        return min(blocks - self.at(done + 1).count(blocks) + 1, -(-n // BLOCK))


@lru_cache(maxsize=1024)
def freed_blocks(spans: tuple[tuple[int, ...], ...]) -> FreedBlocks:
    """Returns the `FreedBlocks` of some spans, made once."""
    return FreedBlocks(spans)
