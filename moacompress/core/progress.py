"""Progress: how long-running functions tell how far they are. The base class is silent."""

from __future__ import annotations

from typing import ClassVar


class Progress:
    """Receives the progress of one task after another; this one ignores it. Subclasses show it.

    Attributes:
        shows: whether anything is shown, and so whether a library may show its own.
    """

    shows: ClassVar[bool] = False

    def start(self, what: str, total: int) -> None:
        """Begins a task.

        Args:
            what: what is being done, in the words of a person ("profiling").
            total: number of steps it takes.
        """

    def step(self, note: str = "") -> None:
        """Counts one step as done; `note` is a short remark such as the best value so far."""

    def done(self) -> None:
        """Ends the task."""

    def say(self, text: str) -> None:
        """Takes a sentence that a person should read before the next task begins."""


SILENT = Progress()
