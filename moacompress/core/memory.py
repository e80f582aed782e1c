"""How much memory this process has, as the system counts it: Python and the libraries included."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_PROC = Path("/proc/self")
_RESET_PEAK = "5"
"""What makes Linux count the peak from now on, written to `clear_refs`."""


def peak_rss() -> int:
    """Returns the most bytes that this process had in memory so far, or since `reset_peak`."""
    # getrusage would also count what the process that started this one had when it did
    high = _kib(_PROC / "status", "VmHWM")
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
    return _kib(_PROC / "status", "VmHWM") is not None


def rss() -> int:
    """Returns the bytes that this process has in memory now; where there is no /proc, the most that it had so far."""
    statm = _PROC / "statm"
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else peak_rss()


def available_bytes() -> int | None:
    """Returns the bytes that a process can still take without swapping; None where the system does not say."""
    free = _kib(Path("/proc/meminfo"), "MemAvailable")
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is None or used is None:
        return free
    return max(limit - used, 0) if free is None else min(free, max(limit - used, 0))


def _kib(file: Path, name: str) -> int | None:
    """Returns the bytes of a line such as `VmHWM:  2284 kB`."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return next((int(kib) * 1024 for kib in found), None)


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
