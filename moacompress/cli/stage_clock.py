"""How far work is that has stages, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

LEAST_SECONDS = 1.0
"""A stage that took less was done before, and says nothing of how fast the next ones go."""


class StageClock:
    """Times stages and the steps of the task at hand.

    What is left of a stage is what its task says, and at least what the stage was expected to take more; the stages behind it
    take what was expected of them, at the pace of those that are done.

    Attributes:
        clock: returns seconds.
        total: steps of the task at hand.
        steps: how many of them are done.
        task_began: when it began, by the clock.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._stages: dict[str, float | None] = {}
        self._in_seconds = False
        self._current: str | None = None
        self._began = self._stage_began = self.task_began = clock()
        self._taken: dict[str, float] = {}
        self.steps = self.total = 0

    def plan(self, stages: Mapping[str, float | None], in_seconds: bool) -> None:
        """See `Progress.plan`."""
        if not self._stages or list(stages) == list(self._stages):
            self._stages, self._in_seconds = dict(stages), in_seconds

    def stage(self, name: str) -> bool:
        """Begins a stage; returns whether it is one of the plan's."""
        if name not in self._stages:
            return False
        if name == self._current:
            return True
        now = self.clock()
        if self._current is None:
            self._began = now
        else:
            self._taken[self._current] = self._taken.get(self._current, 0.0) + now - self._stage_began
        self._current, self._stage_began, self.steps, self.total = name, now, 0, 0
        return True

    def task(self, total: int) -> None:
        """Begins a task of so many steps."""
        self.task_began, self.steps, self.total = self.clock(), 0, total
        if self._current is None:
            self._began = self.task_began

    def step(self) -> None:
        """Counts a step of the task as done."""
        self.steps += 1

    @property
    def label(self) -> str:
        """The stage among all, such as `3 of 7: search`; empty without a plan."""
        if self._current is None:
            return ""
        return f"{list(self._stages).index(self._current) + 1} of {len(self._stages)}: {self._current}"

    def left(self) -> float | None:
        """Returns the seconds until everything is done, None where nothing tells; without a plan, until the task is."""
        task = self._task_left()
        if self._current is None:
            return task
        names = list(self._stages)
        later = [self._stages[name] for name in names[names.index(self._current) + 1 :]]
        own, pace = self._stages[self._current], self._pace(task)
        if own is None or pace is None or None in later:
            return None
        expected = own * pace - (self.clock() - self._stage_began)
        return max(expected, task or 0.0) + pace * sum(seconds for seconds in later if seconds is not None)

    def share(self) -> float | None:
        """Returns how much of everything is done, 0 to 1, by time; without a plan, of the task by steps."""
        left = self.left()
        if self._current is None:
            return self.steps / self.total if self.total else None
        spent = self.clock() - self._began
        return None if left is None else spent / (spent + left) if spent + left else 0.0

    def _task_left(self) -> float | None:
        if not self.steps:
            return None
        return (self.clock() - self.task_began) / self.steps * max(self.total - self.steps, 0)

    def _pace(self, task: float | None) -> float | None:
        """Returns the seconds that one unit of the plan takes, by the stages that are done or else by the task at hand."""
        measured = {name: taken for name, taken in self._taken.items() if taken >= LEAST_SECONDS and self._stages[name]}
        expected = sum(self._stages[name] or 0.0 for name in measured)
        if expected:
            return sum(measured.values()) / expected
        if self._in_seconds:
            return 1.0
        own = self._stages[self._current or ""]
        return None if task is None or not own else (self.clock() - self.task_began + task) / own
