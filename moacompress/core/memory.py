"""How much memory this process has, as the system counts it: Python and the libraries included."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil

_PROC = Path("/proc/self")
_RESET_PEAK = "5"
"""What makes Linux count the peak from now on, written to `clear_refs`."""


def peak_rss() -> int:
    """Returns the most bytes that this process had in memory so far, or since `reset_peak`."""
    # getrusage would also count what the process that started this one had when it did
    high = _high_water()
    if high is not None:
        return high
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> bool:
    """Makes `peak_rss` count from now on; returns whether the system can do that."""
    try:
        (_PROC / "clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return _high_water() is not None


def rss() -> int:
    """Returns the bytes that this process has in memory now."""
    return int(psutil.Process().memory_info().rss)


def available_bytes() -> int:
    """Returns the bytes that a process can still take without swapping."""
    free = int(psutil.virtual_memory().available)
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else min(free, max(limit - used, 0))


def _high_water() -> int | None:
    """Returns the peak that `reset_peak` resets, which psutil does not give; None where the system has none."""
    try:
        lines = (_PROC / "status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
