"""Turns of timing: every side once, then every side again, so that what the machine does meanwhile meets all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Protocol

Clock = Callable[[], float]


class Turn(Protocol):
    """What is timed."""

    def prepare(self) -> None:
        """Does what must be done before; it is not timed."""

    def run(self) -> None:
        """Does what is timed."""


def interleave(
    turns: Mapping[str, Turn],
    repeats: int,
    clock: Clock = time.perf_counter,
    on_turn: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Times every side in turn, `repeats` times, every second time in the other order.

    So no side always runs after the same one, and a machine that slows down within a turn favours none. `on_turn` is called
    after all sides were timed once more. The i-th seconds of all sides were taken one after another.
    """
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(repeats):
        for name, turn in [*turns.items()][:: -1 if number % 2 else 1]:
            turn.prepare()
            gc.disable()  # no collection while the clock runs
            try:
                begin = clock()
                turn.run()
                seconds[name].append(clock() - begin)
            finally:
                gc.enable()
        on_turn()
    return seconds
