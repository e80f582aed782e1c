"""Progress: how long-running functions tell how far they are. The base class is silent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class Progress:
    """Receives the progress of one task after another, in stages; this one ignores it. Subclasses show it.

    Attributes:
        shows: whether anything is shown, and so whether a library may show its own.
    """

    shows: ClassVar[bool] = False

    def plan(self, stages: Mapping[str, float | None], *, in_seconds: bool = False) -> None:
        """Names the stages of the whole before the first of them, each with how long it is expected to take, None for unknown.

        Whoever calls first decides them: what it calls in turn may name its own, which count where nobody else did. The same
        names again give other numbers. They are seconds, or only compare the stages.
        """

    def stage(self, name: str) -> None:
        """Begins a stage; a name that is not in the plan is ignored."""

    def start(self, what: str, total: int) -> None:
        """Begins a task of `total` steps; `what` is being done, in the words of a person ("profiling")."""

    def step(self, note: str = "") -> None:
        """Counts one step as done; `note` is a short remark such as the best value so far."""

    def beat(self) -> None:
        """Says that a step, which may take minutes, goes on."""

    def done(self) -> None:
        """Ends the task."""

    def say(self, text: str) -> None:
        """Takes a sentence that a person should read before the next task begins."""


SILENT = Progress()
