"""Every benchmark starts, whatever its neighbours are called: Python looks for modules in a script's folder first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("*.py")))
def test_it_starts(script: str) -> None:
    """With cProfile, which takes the standard library's `profile` for granted."""
    code = f"import sys, runpy; sys.path.insert(0, {str(FOLDER)!r}); import cProfile; sys.argv = ['', '--help']; "
    code += f"assert cProfile.run; runpy.run_path({str(FOLDER / script)!r}, run_name='__main__')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("usage: ")
