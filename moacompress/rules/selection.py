"""Which tokens a gate keeps: the one definition, in integers, of who stays and who goes as tokens leave the window.

Tokens compete in the order in which they leave. While fewer than `windows.selected` are kept, the next one is taken; then it
takes the place of the one of least score if its own is higher, or is gone. Of equals the one in the first place goes, and who
is kept stays against an equal. So what is kept depends on the scores of those that have left alone, and on nothing after them.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from moacompress.core.arrays import Ints
from moacompress.rules.windows import selected

NEVER = 1 << 40
"""Of a token that is kept: how many have left when it goes."""


@dataclass(frozen=True, eq=False)
class Turnover:
    """What becomes of the tokens that a KV head has kept, and of those that leave its window one after the other.

    Tokens are those kept before, in the order of their places, then the others in the order in which they leave; all arrays are
    int64 `[kept before + leaving]`.

    Attributes:
        left: how many had left before.
        kept_before: how many of them had been kept.
        entered: how many have left when each is first kept, `left` for those that were kept before.
        gone: how many have left when it is kept no longer: `entered` where it never is, `NEVER` where it stays.
        places: where it is kept; -1 where it never is.
    """

    left: int
    kept_before: int
    entered: Ints
    gone: Ints
    places: Ints

    @staticmethod
    def of(left: int, kept_before: int, gone: Ints, places: Ints) -> Turnover:
        """Returns it with `entered`, which follows."""
        leaving = np.arange(left + 1, left + 1 + len(gone) - kept_before, dtype=np.int64)
        return Turnover(
            left, kept_before, np.concatenate([np.full(kept_before, left, np.int64), leaving]), gone, places
        )

    @property
    def ever(self) -> Ints:
        """The tokens that are kept for a while."""
        return np.flatnonzero(self.gone > self.entered)

    @property
    def new(self) -> Ints:
        """The tokens that leave and are kept at the end."""
        return np.flatnonzero((self.gone == NEVER) & (self.entered > self.left))


def turnover(scores: Ints, select_alpha: int, select_beta_q: int, kept: Ints | None = None, left: int = 0) -> Turnover:
    """Lets tokens leave a window, one after the other.

    Args:
        scores: of those that leave, in that order, integers `[leaving]`.
        select_alpha: see `windows.selected`.
        select_beta_q: likewise.
        kept: scores of those that are kept so far, by their places; none by default.
        left: how many have left so far.
    """
    held = [] if kept is None else kept.tolist()
    count, before = len(held), len(held)
    heap = [(score, place) for place, score in enumerate(held)]
    heapq.heapify(heap)
    owner = [*range(count)]
    leaving = scores.tolist()
    gone = [NEVER] * count
    places = [*range(count)]
    for number, score in enumerate(leaving):
        now = left + number + 1
        if count < selected(now, select_alpha, select_beta_q):
            heapq.heappush(heap, (score, count))
            owner.append(before + number)
            places.append(count)
            gone.append(NEVER)
            count += 1
        elif count and score > heap[0][0]:
            _, place = heapq.heapreplace(heap, (score, heap[0][1]))
            gone[owner[place]] = now
            owner[place] = before + number
            places.append(place)
            gone.append(NEVER)
        else:
            places.append(-1)
            gone.append(now)
    return Turnover.of(left, before, np.array(gone, np.int64), np.array(places, np.int64))
