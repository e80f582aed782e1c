"""What there is to know of the processor without torch."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """Returns the name of the processor, as the system has it."""
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
