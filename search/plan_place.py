"""The place of a plan: one worker of a search writes there, its lock holder; the others wait for it, or take over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from moacompress.core.errors import InUseError
from moacompress.core.lock_holders import own_file
from moacompress.search.deadline import Deadline

PAUSE = 0.5
"""Seconds after which a worker looks again whether another one has written the plan."""


class PlanPlace:
    """Where a search writes its plan.

    Attributes:
        path: of the plan; None for nowhere.
        ours: whether this process writes there.
    """

    def __init__(self, path: Path | None, lock: ExitStack) -> None:
        self.path, self.ours, self._lock = path, False, lock
        self._held = False

    @property
    def out(self) -> Path | None:
        """The path where this process writes, None where it does not."""
        return self.path if self.ours else None

    def take(self, shared: bool) -> None:
        """Makes this process the lock holder, unless another one is, and may be as it works on the same search (`shared`).

        Raises:
            InUseError: another process is, and may not be.
            ArtefactError: the folder cannot be written.
        """
        if self._held:
            self.ours = True
        elif self.path is not None:
            try:
                self._lock.enter_context(own_file(self.path))
                self.ours = self._held = True
            except InUseError:
                if not shared:
                    raise

    def settle(self, is_written: Callable[[], bool], deadline: Deadline) -> None:
        """Waits until the plan is written, be it by an earlier lock holder, or this process is to write it.

        A worker whose time is up does not wait for the lock holder.
        """
        while self.path is not None and not is_written():
            if self.ours or deadline.stopped or deadline.over():
                return
            self.take(shared=True)
            if not self.ours:
                time.sleep(PAUSE)
        self.ours = False


@contextmanager
def plan_place(path: Path | None, shared: bool) -> Iterator[PlanPlace]:
    """Makes this process the lock holder of a plan's file as long as the block runs, unless another worker is.

    With `shared` another process may be the lock holder, as that works on the same search.

    Raises:
        InUseError: another process is, and may not be.
        ArtefactError: the folder cannot be written.
    """
    with ExitStack() as lock:
        place = PlanPlace(path, lock)
        place.take(shared)
        yield place
