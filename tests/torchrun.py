"""Commands in several processes, as `torchrun` starts them, on this machine's processor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def torchrun(processes: int, *command: str | Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Runs `moacompress` with arguments, or a script where the first of them is one, in so many processes of one thread."""
    program = [] if str(command[0]).endswith(".py") else ["-m", "moacompress"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*start, *program, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=timeout,
    )
