"""Starts a runner by its name: `python -P start.py NAME TASK`.

The folder of the benchmarks goes last in Python's path.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    engine = importlib.import_module("rivals.runners.engine")
    engine.serve(importlib.import_module(f"rivals.runners.{sys.argv[1]}").make)
