"""Progress for people, on stderr: a bar on a terminal, otherwise a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from moacompress.cli.stage_clock import StageClock
from moacompress.core.progress import Progress
from moacompress.core.tables import readable_seconds

LINE_SECONDS = 15.0
"""Seconds between two lines where there is no terminal."""


class RichProgress(Progress):
    """Shows one task at a time; a new one ends the one before. `first` gives a line that is shown before all tasks."""

    shows = True

    def __init__(
        self, console: Console, first: Callable[[], str] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._first = first
        self._stages = StageClock(clock)
        self._bars: Bars | None = None
        self._what, self._note = "", ""
        self._running = False
        self._said = 0.0

    def plan(self, stages: Mapping[str, float | None], *, in_seconds: bool = False) -> None:
        """Names the stages of the whole."""
        self._stages.plan(stages, in_seconds)

    def stage(self, name: str) -> None:
        """Begins a stage, with a line where there is no bar."""
        self._begin()
        self.done()
        if self._stages.stage(name) and not self._console.is_terminal:
            self._line(self._stages.label + self._outlook())
            self._said = self._stages.clock()

    def start(self, what: str, total: int) -> None:
        """Begins a task."""
        self._begin()
        self.done()
        self._what, self._note, self._running = what, "", True
        self._stages.task(total)
        self._said = self._stages.task_began
        if self._console.is_terminal:
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=self._console,
                refresh_per_second=4,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._bars.add_task(self._name, total=total, note="")
            self._bars.start()
        else:
            self._line(f"{self._name}: {total} steps{self._outlook()}")

    def step(self, note: str = "") -> None:
        """Counts one step as done."""
        self._note = note
        self._stages.step()
        self.beat()

    def beat(self) -> None:
        """Brings the bar up to date, or says a line where the last one is some time ago."""
        if self._bars is not None:
            told = ", ".join(filter(None, [self._outlook().removeprefix(", "), self._note]))
            self._bars.update(self._bars.task_ids[0], completed=self._stages.steps, note=told)
        elif self._running and self._stages.clock() - self._said >= LINE_SECONDS:
            self._said = self._stages.clock()
            note = f" ({self._note})" if self._note else ""
            self._line(f"{self._name}: {self._stages.steps}/{self._stages.total}{self._outlook()}{note}")

    def done(self) -> None:
        """Ends the task; without one it does nothing."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        elif self._running:
            taken = self._stages.clock() - self._stages.task_began
            self._line(f"{self._name}: {self._stages.steps}/{self._stages.total} in {taken:.0f} s")
        self._running = False

    def say(self, text: str) -> None:
        """Shows a sentence, between two tasks."""
        self._begin()
        self.done()
        self._line(text)

    @property
    def _name(self) -> str:
        """The task, behind its stage."""
        return ", ".join(filter(None, [self._stages.label, self._what]))

    def _outlook(self) -> str:
        """Returns how much of everything is done and how long the rest takes, as far as that is known."""
        share, left = self._stages.share(), self._stages.left()
        if left is None:
            return ""
        return (f", {share:.0%}" if share is not None else "") + f", about {readable_seconds(left)} left"

    def _begin(self) -> None:
        """Shows the first line, once."""
        if self._first is not None:
            self._line(self._first())
            self._first = None

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)
