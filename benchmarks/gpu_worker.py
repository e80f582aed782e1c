"""The process that has the device: it runs the parts of `gpu.py`, and whoever started it goes on without it if it ends."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from gpu_rows import Boxes, Task, run_tasks  # beside this script
from gpu_sizes import LARGE, SMALL
from harness import Row

WEIGHTS = {"correct": 3.0, "ceiling": 0.5, "decode": 3.0, "prefill": 1.5, "e2e": 10.0}
"""Share of the time of each part, in their order."""
START = 120.0
"""Seconds until a process must have begun its first task."""
GRACE = 20.0
"""Seconds that a task may take beyond the end of its part's box before its process is ended."""


class Asked(NamedTuple):
    """What is asked of a process: parts, from number `first` of the first one on, until so many s of `time.monotonic`."""

    device: str
    small: bool
    parts: tuple[str, ...]
    until: float
    first: int = 0


class Begun(NamedTuple):
    """What a process says when a task begins; `end` is of the part's box, s of `time.monotonic`."""

    part: str
    number: int
    what: str
    end: float


def parts_of(runner: Any) -> dict[str, Callable[[], Iterator[Task]]]:
    """Returns what makes the tasks of each part, by name."""
    from gpu_correct import correct
    from gpu_layers import ceiling, decode, prefill
    from gpu_steps import e2e

    made = {"correct": correct, "ceiling": ceiling, "decode": decode, "prefill": prefill, "e2e": e2e}
    return {name: partial(of, runner) for name, of in made.items()}


def work(connection: Connection, asked: Asked) -> None:
    """Runs parts and sends what happens: a `Begun` for a task, a row, and None at the end.

    Where the device does not answer any more after an error, the process ends.
    """
    import torch
    from gpu_runner import Runner

    runner = Runner(asked.device, SMALL if asked.small else LARGE)
    _ = runner.copied  # while there is memory for it
    card = torch.cuda.get_device_name(runner.device) if runner.on_gpu else "a CPU, not a measurement"
    boxes = Boxes({part: WEIGHTS[part] for part in asked.parts}, asked.until)
    for part in asked.parts:
        end = boxes.begin(part)
        gc.collect()
        if runner.on_gpu:
            torch.cuda.empty_cache()

        def begun(number: int, what: str, part: str = part, end: float = end) -> None:
            connection.send(Begun(part, number, what, end))

        def done(row: Row, part: str = part) -> None:
            connection.send({"part": part, "card": card, "torch": torch.__version__, **row})
            if "failed" in row and runner.on_gpu:
                torch.cuda.synchronize(runner.device)

        first = asked.first if part == asked.parts[0] else 0
        run_tasks(parts_of(runner)[part](), end, time.monotonic, begun, done, first)
    connection.send(None)


def run_parts(asked: Asked, write: Callable[[Row], None], target: Callable[[Connection, Asked], None] = work) -> None:
    """Has processes run parts, one after another where one ends in the midst of a task or takes too long for it."""
    while True:
        last = _until_it_ends(asked, write, target)
        if last is None:
            return
        asked = asked._replace(parts=asked.parts[asked.parts.index(last.part) :], first=last.number + 1)


def _until_it_ends(
    asked: Asked, write: Callable[[Row], None], target: Callable[[Connection, Asked], None]
) -> Begun | None:
    """Runs one process; returns the task in which it ended, or None where it did all it could."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(theirs, asked))
    process.start()
    theirs.close()
    last: Begun | None = None
    told = True
    try:
        while True:
            left = START if last is None else max(0.0, last.end - time.monotonic()) + GRACE
            if not ours.poll(left):
                problem = f"it took {left:.0f} s and was ended"
                break
            try:
                message = ours.recv()
            except EOFError:
                process.join()
                problem = f"its process ended with {process.exitcode}"
                break
            if message is None:
                return None
            if isinstance(message, Begun):
                last, told = message, False
            else:
                write(message)
                told = True
        if last is None:
            write({"part": asked.parts[0], "what": "start", "failed": problem})
        elif not told:
            write({"part": last.part, "what": last.what, "failed": problem})
        return last
    finally:
        with suppress(OSError):
            process.kill()
        process.join()
