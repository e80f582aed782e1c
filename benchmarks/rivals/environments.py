"""The environments that rivals run in: one each, made by pip from its pinned requirements, and made again when these change."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from moacompress.core.errors import UsageError
from rivals.settings import OURS, REQUIREMENTS

MARK = "made-from.txt"


def python_of(rival: str, folder: Path) -> Path:
    """Returns the Python that a rival runs in; makes its environment where there is none of these requirements.

    Raises:
        UsageError: pip cannot make it; says why.
    """
    if rival == OURS:
        return Path(sys.executable)
    environment = folder / rival
    python, mark = environment / "bin/python", environment / MARK
    wanted = (REQUIREMENTS / f"{rival}.txt").read_text("utf-8")
    if python.exists() and mark.exists() and mark.read_text("utf-8") == wanted:
        return python
    print(f"making the environment of {rival} in {environment}", file=sys.stderr)
    shutil.rmtree(environment, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(environment)], rival)
    _run([str(python), "-m", "pip", "install", "-q", "-r", str(REQUIREMENTS / f"{rival}.txt")], rival)
    mark.write_text(wanted, "utf-8")
    return python


def _run(command: list[str], rival: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise UsageError(f"the environment of {rival} cannot be made: {' '.join(command[:5])} ... said\n{said}")
