"""Starts a runner by its name: `python -P start.py NAME TASK`.

The folder of the benchmarks goes last in Python's path: some of its scripts have the names of modules of the standard library.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    importlib.import_module(f"rivals.runners.{sys.argv[1]}").main()
