"""Which tokens a gate selects: the one definition, in integers, of when they are admitted and evicted, and of their places.

Tokens compete in the order in which they leave the window. While fewer than `windows.selected` are selected, the next one is
admitted; then it takes the place of the one of least score if its own is higher. Of equals the one in the first place is
evicted, and a selected token stays against an equal. So the selection depends on the scores of the evicted tokens
alone, and on nothing after them.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace

import numpy as np

from moacompress.core.arrays import Bools, Ints, ragged_ranges
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import selected

NEVER = 1 << 40
"""When a token is evicted that stays selected."""


@dataclass(frozen=True, eq=False)
class EvictionSchedule:
    """The tokens that compete in a chunk: who they are, when each is selected, and where it lies.

    Those of every (row, KV head) come one after the other: first the tokens selected before the chunk, in the order of their
    places, then the others as they leave the window. Times are numbers of tokens that are evicted from the window of the KV
    head: a query attends to a selected token from `admitted` on, and no longer once it is `evicted`. All arrays are int64.

    Attributes:
        heads: KV heads of a row.
        begins: where the tokens of each (row, KV head) begin, and all end, `[rows * heads + 1]`.
        positions: of the tokens in their row, `[tokens]`; -1 of those selected before, of which it is not known.
        admitted: `[tokens]`; of those selected before how many were evicted then.
        evicted: `[tokens]`; `admitted` where a token is never selected, `NEVER` where it stays.
        places: among the selected tokens of the KV head, `[tokens]`; -1 where a token is never selected.
    """

    heads: int
    begins: Ints
    positions: Ints
    admitted: Ints
    evicted: Ints
    places: Ints

    @property
    def owners(self) -> Ints:
        """The row and KV head of each token, `row * heads + head`, int64 `[tokens]`."""
        return np.repeat(np.arange(len(self.begins) - 1), np.diff(self.begins))

    @property
    def rows_and_heads(self) -> tuple[Ints, Ints]:
        """The row and the KV head of each token, int64 `[tokens]` each."""
        rows, heads = np.divmod(self.owners, self.heads)
        return rows, heads

    @property
    def ever_selected(self) -> EvictionSchedule:
        """The tokens that some query of the chunk may attend to."""
        return self.only(self.evicted > self.admitted)

    @property
    def newly_selected(self) -> EvictionSchedule:
        """The tokens that are admitted in the chunk, and still selected at its end."""
        return self.only((self.evicted == NEVER) & (self.positions >= 0))

    def only(self, which: Bools) -> EvictionSchedule:
        """Returns some of the tokens, bool `[tokens]`."""
        return self._picked(which, np.bincount(self.owners[which], minlength=len(self.begins) - 1), self.heads)

    def of_rows(self, rows: Ints) -> EvictionSchedule:
        """Returns the tokens of some rows of the batch."""
        pairs = rows[:, None] * self.heads + np.arange(self.heads)
        _, at = ragged_ranges(self.begins[pairs], self.begins[pairs + 1])
        return self._picked(at, np.diff(self.begins)[pairs.reshape(-1)], self.heads)

    def of_head(self, row: int, head: int) -> EvictionSchedule:
        """Returns the tokens of one row and KV head."""
        at = slice(*self.begins[row * self.heads + head :][:2].tolist())
        return self._picked(at, np.array([at.stop - at.start]), 1)

    def _picked(self, at: Bools | Ints | slice, counts: Ints, heads: int) -> EvictionSchedule:
        parts = (self.positions, self.admitted, self.evicted, self.places)
        return EvictionSchedule(heads, np.concatenate([[0], np.cumsum(counts)]), *(part[at] for part in parts))


def competing_tokens(rules: RuleTable, first: Ints, after: Ints) -> EvictionSchedule:
    """Returns the tokens that compete while tokens leave the windows; nobody is evicted or admitted to a place yet.

    `first` and `after` are how many tokens are evicted from each window before and at the end, `[rows, heads]`.
    """
    before = selected(first, *rules.select)
    sizes = np.where(rules.selecting, after - first + before, 0)
    owner, number = ragged_ranges(np.zeros_like(sizes), sizes)
    begins = np.concatenate([[0], np.cumsum(sizes)])
    held, start = before.reshape(-1)[owner], first.reshape(-1)[owner]
    admitted = start + np.maximum(number - held + 1, 0)
    positions = np.where(number < held, -1, rules.span.sink[owner % len(rules)] + admitted - 1)
    places = np.where(number < held, number, -1)
    return EvictionSchedule(len(rules), begins, positions, admitted, np.full(len(owner), NEVER), places)


def eviction_schedule(tokens: EvictionSchedule, rules: RuleTable, scores: Ints) -> EvictionSchedule:
    """Lets the tokens of `competing_tokens` compete by their scores, `[tokens]`; the compiled kernels do the same."""
    found = replace(tokens, evicted=tokens.evicted.copy(), places=tokens.places.copy())
    alphas, betas = rules.select
    for pair, (begin, end) in enumerate(zip(tokens.begins[:-1].tolist(), tokens.begins[1:].tolist(), strict=True)):
        head = pair % len(rules)
        select_alpha, select_beta_q = int(alphas[head]), int(betas[head])
        heap: list[tuple[int, int, int]] = []  # score, place, token
        for token, score in enumerate(scores[begin:end].tolist(), begin):
            if tokens.positions[token] < 0:
                heapq.heappush(heap, (score, int(tokens.places[token]), token))
                continue
            now = int(tokens.admitted[token])
            if len(heap) < selected(now, select_alpha, select_beta_q):
                found.places[token] = len(heap)
                heapq.heappush(heap, (score, len(heap), token))
            elif heap and score > heap[0][0]:
                _, place, evicted = heap[0]
                heapq.heapreplace(heap, (score, place, token))
                found.evicted[evicted], found.places[token] = now, place
            else:
                found.evicted[token] = now
    return found
