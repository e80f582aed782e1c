"""What `gpu.py` is made of: a part is a list of tasks, each of which gives one row of the results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from harness import Row, markdown  # beside this script

TIME_IS_OVER = "the part's time was over"


class NotHereError(Exception):
    """This device, or what is installed, has nothing to measure."""


class Task(NamedTuple):
    """What gives one row, with its name in it."""

    what: str
    run: Callable[[], Row]


class Boxes:
    """The time of each part: a share of what is left, so that what a part does not use goes to those after it.

    `weights` are of all parts that are to come, in their order; all must be done `until` then, in seconds of the clock.
    """

    def __init__(self, weights: Mapping[str, float], until: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._weights, self._until, self.clock = dict(weights), until, clock

    def begin(self, part: str) -> float:
        """Returns when the box of a part that begins now ends, s of the clock."""
        total, now = sum(self._weights.values()), self.clock()
        return now + (self._until - now) * self._weights.pop(part) / total


Begun = Callable[[int, str], None]
"""Is told the number and the name of a task that begins."""
Done = Callable[[Row], None]
"""Is given a row."""


def run_tasks(
    tasks: Iterable[Task], end: float, clock: Callable[[], float], begun: Begun, done: Done, first: int = 0
) -> None:
    """Runs the tasks of a part; what would begin after the end of its box is a row that says so.

    `end` is of its box, s of the clock; tasks before number `first` are left out.
    """
    for number, task in enumerate(tasks):
        if number < first:
            continue
        if clock() >= end:
            done({"what": task.what, "skipped": TIME_IS_OVER})
            continue
        begun(number, task.what)
        begin = clock()
        row = attempted(task.run)
        done({"what": task.what, **row, "seconds": round(clock() - begin, 1)})


def attempted(run: Callable[[], Row]) -> Row:
    """Returns a row; what cannot be had here is `skipped`, an error is `failed`."""
    try:
        return run()
    except (ImportError, NotHereError) as error:
        return {"skipped": first_line(error)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {first_line(error)}"}


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def table(rows: Sequence[Row]) -> str:
    """Returns results as a table in Markdown."""
    cells = []
    for row in rows:
        found = {name: value for name, value in row.items() if name not in ("part", "card", "torch", "what", "seconds")}
        cells.append(
            [row["part"], row.get("what", ""), ", ".join(f"{name} {said_as(value)}" for name, value in found.items())]
        )
    return markdown(["part", "what", "result"], cells, 3)


def said_as(value: Any) -> str:
    """Returns a value as the tables have it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
