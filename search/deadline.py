"""When a search has to stop."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from moacompress.core.errors import OutOfTimeError
from moacompress.core.progress import Progress

logger = logging.getLogger(__name__)


class TimeUp(Exception):
    """The time of a search is over: whatever was being measured is left as it is, and what was found so far stands."""


@dataclass
class Deadline:
    """The time that a search may take, all of it; it is asked before every measurement of a sample.

    Attributes:
        timeout: seconds; None for no end.
        started: `time.monotonic()` from which the time counts, by default now.
        stopped: whether it was asked after its end, so that something was left out.
    """

    timeout: float | None = None
    started: float = field(default_factory=lambda: time.monotonic())
    stopped: bool = False

    @property
    def left(self) -> float | None:
        """The seconds that are left, 0 where the time is over; None for no end."""
        return None if self.timeout is None else max(0.0, self.started + self.timeout - time.monotonic())

    def over(self) -> bool:
        """Returns whether the time is up."""
        if self.timeout is None or time.monotonic() - self.started <= self.timeout:
            return False
        if not self.stopped:
            logger.info("the search stops: %g seconds are over", self.timeout)
        self.stopped = True
        return True

    def check(self) -> None:
        """Does nothing as long as there is time.

        Raises:
            TimeUp: the time is up.
        """
        if self.over():
            raise TimeUp

    def too_short(self) -> OutOfTimeError:
        """Returns the error of a search that has no plan to hand back when the time is up."""
        return OutOfTimeError(
            f"the {self.timeout:g} seconds of --timeout were over before a plan was measured; what was measured is kept: the "
            "same command with a longer one resumes"
        )

    def part(self, of: int) -> Deadline:
        """Returns the deadline of one of `of` searches that are left, each of which gets as much of the time."""
        left = self.left
        return Deadline(None if left is None else left / of)

    def within(self, progress: Progress) -> Progress:
        """Returns a progress for one task, which raises `TimeUp` after the step in which the time is up."""
        return _TimedProgress(progress, self)


@dataclass(frozen=True)
class _TimedProgress(Progress):
    progress: Progress
    deadline: Deadline

    def start(self, what: str, total: int) -> None:
        self.deadline.check()
        self.progress.start(what, total)

    def step(self, note: str = "") -> None:
        self.progress.step(note)
        self.deadline.check()

    def done(self) -> None:
        self.progress.done()
