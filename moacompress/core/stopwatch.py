"""Seconds of work on a machine that may be busy with something else."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from moacompress.core.tables import readable_seconds

BUSY = 1.5
"""How many times as long as alone work must take for the machine to count as busy."""


class Begun(NamedTuple):
    """When something began.

    Attributes:
        wall: seconds of the clock.
        own: seconds of the processor that this thread had until then.
    """

    wall: float
    own: float


class Stopwatch:
    """Tells what work takes alone on the machine from what it takes now.

    Work of this thread on the processor, with the helpers that it waits for, takes as long alone as this thread computes: the
    rest of the clock's time other processes had. Of an accelerator only the clock is known.

    Args:
        wait: waits until an accelerator is done; None for work on the processor.

    Attributes:
        alone: seconds of everything that was timed, as they would be alone.
        taken: seconds that it took.
    """

    def __init__(self, wait: Callable[[], object] | None = None) -> None:
        self._wait = wait
        self.alone = self.taken = 0.0

    def begin(self) -> Begun:
        """Returns now."""
        if self._wait is not None:
            self._wait()
        return Begun(time.perf_counter(), time.thread_time())

    def since(self, begun: Begun) -> float:
        """Returns the seconds that work since then takes alone, and counts it."""
        now = self.begin()
        taken = now.wall - begun.wall
        alone = min(taken, now.own - begun.own) if self._wait is None else taken
        self.taken += taken
        self.alone += alone
        return alone

    def least(self, work: Callable[[], object], repeats: int) -> float:
        """Returns the least of the seconds that work takes alone, after one time that does not count."""
        work()
        seconds = []
        for _ in range(repeats):
            begun = self.begin()
            work()
            seconds.append(self.since(begun))
        return min(seconds)

    @property
    def slowdown(self) -> float:
        """How many times as long as alone everything took, at least 1."""
        return max(1.0, self.taken / self.alone) if self.alone else 1.0


def busy_note(seconds: float, slowdown: float) -> str | None:
    """Returns a sentence for people about an estimate that was made while the machine was busy; None where it was not.

    Args:
        seconds: of the work alone.
        slowdown: how many times as long the work took that was timed.
    """
    if slowdown < BUSY:
        return None
    return (
        "The machine is busy: this is the time it takes alone; beside what runs now it would be about "
        f"{readable_seconds(seconds * slowdown)}."
    )
