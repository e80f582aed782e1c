"""What work takes on several devices, each as fast as the one that was timed, where a task goes to whichever has time first."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any

from moacompress.core.tables import readable_seconds


def makespan(tasks: Iterable[float], devices: int) -> float:
    """Returns the seconds until the last of some tasks is done, the longest being taken first.

    Args:
        tasks: seconds of each.
        devices: how many there are.
    """
    free = [0.0] * devices
    for seconds in sorted(tasks, reverse=True):
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def on_devices(alone: float, together: float, devices: int, each_bytes: int) -> tuple[list[str], dict[str, Any]]:
    """Returns what a person and a program are told of work on several devices; nothing where there is one.

    Args:
        alone: seconds on one device.
        together: seconds on all of them.
        devices: how many there are.
        each_bytes: memory that each takes.
    """
    if devices == 1:
        return [], {}
    busy = min(1.0, alone / (together * devices)) if together else 1.0
    text = (
        f"On {devices} devices as fast as this one: about {readable_seconds(together)}, busy {busy:.0%} of it; each loads the "
        "whole model."
    )
    facts = {
        "count": devices,
        "seconds": together,
        "busy": busy,
        "bytes": each_bytes,
        "all_bytes": devices * each_bytes,
    }
    return [text], {"devices": facts}
