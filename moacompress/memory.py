"""How much memory this process has, as the system counts it: Python and the libraries included."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_rss() -> int:
    """Returns the most bytes that this process had in memory so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss() -> int:
    """Returns the bytes that this process has in memory now; where there is no /proc, the most that it had so far."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else peak_rss()
