"""Progress for people, on stderr: a bar on a terminal, otherwise a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from moacompress.core.progress import Progress

LINE_SECONDS = 15.0
"""Seconds between two lines where there is no terminal."""


class RichProgress(Progress):
    """Shows one task at a time; a new one ends the one before.

    Args:
        console: where.
        first: gives a line that is shown before the first task.
    """

    shows = True

    def __init__(self, console: Console, first: Callable[[], str] | None = None) -> None:
        self._console = console
        self._first = first
        self._bars: Bars | None = None
        self._what, self._total, self._steps = "", 0, 0
        self._running = False
        self._begun = self._said = 0.0

    def start(self, what: str, total: int) -> None:
        """Begins a task."""
        self._begin()
        self.done()
        self._what, self._total, self._steps, self._running = what, total, 0, True
        self._begun = self._said = time.monotonic()
        if self._console.is_terminal:
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=self._console,
                refresh_per_second=4,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._bars.add_task(what, total=total, note="")
            self._bars.start()
        else:
            self._line(f"{what}: {total} steps")

    def step(self, note: str = "") -> None:
        """Counts one step as done."""
        self._steps += 1
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], completed=self._steps, note=note)
        elif time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            self._line(f"{self._what}: {self._steps}/{self._total}" + (f" ({note})" if note else ""))

    def done(self) -> None:
        """Ends the task; without one it does nothing."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        elif self._running:
            self._line(f"{self._what}: {self._steps}/{self._total} in {time.monotonic() - self._begun:.0f} s")
        self._running = False

    def say(self, text: str) -> None:
        """Shows a sentence, between two tasks."""
        self._begin()
        self.done()
        self._line(text)

    def _begin(self) -> None:
        """Shows the first line, once."""
        if self._first is not None:
            self._line(self._first())
            self._first = None

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)
