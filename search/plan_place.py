"""The place of a plan: one worker of a search writes there, its lock holder; the others wait for it, or take over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from moacompress.core.errors import InUseError
from moacompress.core.lock_holders import own_file


class PlanPlace:
    """Where a search writes its plan.

    Attributes:
        path: of the plan; None for nowhere.
        ours: whether this process writes there.
    """

    def __init__(self, path: Path | None, ours: bool, taking: ExitStack) -> None:
        self.path, self.ours, self._taking = path, ours, taking

    @property
    def out(self) -> Path | None:
        """The path where this process writes, None where it does not."""
        return self.path if self.ours else None

    def settled(self, written: Callable[[], bool], pause: Callable[[], None]) -> bool:
        """Waits until the plan is written by the lock holder, or this process is that; returns whether it is to write.

        What is there already is not written again: a worker that comes after the lock holder has gone finds the plan.

        Args:
            written: returns whether the plan is there.
            pause: waits a moment.
        """
        if self.ours:
            self.ours = not written()
            return self.ours
        while not self.ours and self.path is not None and not written():
            try:
                self._taking.enter_context(own_file(self.path))
                self.ours = not written()
                break
            except InUseError:
                pause()
        return self.ours


@contextmanager
def plan_place(path: Path | None, shared: bool) -> Iterator[PlanPlace]:
    """Makes this process the lock holder of a plan's file as long as the block runs, unless another worker is.

    Args:
        path: of the plan; None for nowhere.
        shared: whether another process may be the lock holder, as that works on the same search.

    Raises:
        InUseError: another process is, and may not be.
        ArtefactError: the folder cannot be written.
    """
    with ExitStack() as taking:
        ours = path is not None
        if path is not None:
            try:
                taking.enter_context(own_file(path))
            except InUseError:
                if not shared:
                    raise
                ours = False
        yield PlanPlace(path, ours, taking)
