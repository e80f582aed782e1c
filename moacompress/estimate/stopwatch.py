"""Seconds of work on a machine that may be busy with something else."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

T = TypeVar("T")

REPEATS = 3
"""How often short work is timed; the least counts."""
SHORT_SECONDS = 0.1
"""Of work that is short."""


class Stopwatch:
    """Tells what work takes alone on the machine from what it takes now.

    Work of this thread on the processor, with the helpers that it waits for, takes as long alone as this thread computes: the
    rest of the clock's time other processes had. Of an accelerator only the clock is known, once it is done.

    Args:
        device: where the work is.

    Attributes:
        alone: seconds of everything that was timed, as they would be alone.
        taken: seconds that it took.
    """

    def __init__(self, device: str | torch.device) -> None:
        place = torch.device(device)
        self._wait = None if place.type == "cpu" else partial(torch.accelerator.synchronize, place)
        self.alone = self.taken = 0.0

    def once(self, work: Callable[[], T]) -> tuple[float, T]:
        """Returns the seconds that work takes alone, and what it returns."""
        wall, own = self._now()
        result = work()
        ended, done = self._now()
        taken = ended - wall
        alone = min(taken, done - own) if self._wait is None else taken
        self.taken += taken
        self.alone += alone
        return alone, result

    def best(self, work: Callable[[], object]) -> float:
        """Returns the seconds that work takes alone; of short work the least of several times."""
        first, _ = self.once(work)
        if first > SHORT_SECONDS:
            return first
        return min([first, *(self.once(work)[0] for _ in range(REPEATS - 1))])

    @property
    def slowdown(self) -> float:
        """How many times as long as alone everything took, at least 1."""
        return max(1.0, self.taken / self.alone) if self.alone else 1.0

    def _now(self) -> tuple[float, float]:
        """Returns the seconds of the clock, and those of the processor that this thread has had."""
        if self._wait is not None:
            self._wait()
        return time.perf_counter(), time.thread_time()
