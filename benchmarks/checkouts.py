"""Two checkouts of this project side by side: the same numbers to the bit, and how long the same command takes in each.

    python benchmarks/checkouts.py ../old . --record
    python benchmarks/checkouts.py ../old . -- benchmarks/attention.py --json --quick
    python benchmarks/checkouts.py ../old . -- -m moacompress bench runs/mine --quick --no-peak --json

Each checkout has its own `.venv` (`make setup`). A command is what follows Python's name. It prints one JSON object, and runs
in both checkouts in turns, in the folder of each: the machine's speed drifts, and a pair of neighbours meets the same of it.
Every field whose name is `ms`, or ends in `_ms` or `_s`, is a time; rows are paired by the fields that name them. For every
time the ratio new / old is the geometric mean over the rows, and its interval that of the mean over the pairs
(Student's t; null below 5 pairs).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moacompress.core.statistics import exponential_mean

PAIRS = 7
RECORD = "tests/golden/record.py"


def run(checkout: Path, command: list[str]) -> Any:
    """Returns what a command prints in a checkout, by that checkout's Python."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    python = checkout.absolute() / ".venv/bin/python"
    done = subprocess.run(
        [str(python), *command], cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed in {checkout} with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def is_time(name: str) -> bool:
    """Returns whether a field of this name is a time."""
    return name == "ms" or name.endswith(("_ms", "_s"))


def times(found: Any, path: str = "") -> Iterator[tuple[str, str, float]]:
    """Yields all times in a command's result: the name of the field, what names its row, and the time."""
    if isinstance(found, list):
        for item in found:
            yield from times(item, path)
    elif isinstance(found, dict):
        named = {
            name: value
            for name, value in found.items()
            if isinstance(value, str | int) and not is_time(name) and "bytes" not in name
        }
        here = f"{path} {json.dumps(named, sort_keys=True)}"
        for name, value in found.items():
            if is_time(name) and isinstance(value, float | int):
                yield name, here, float(value)
            elif isinstance(value, dict | list):
                yield from times(value, f"{here} {name}")


def log_ratios(old: Any, new: Any) -> dict[str, float]:
    """Returns of every time the mean over rows of the logarithm of new / old."""
    before = {(name, row): value for name, row, value in times(old)}
    found: dict[str, list[float]] = {}
    for name, row, value in times(new):
        if before.get((name, row), 0) > 0 < value:
            found.setdefault(name, []).append(math.log(value / before[name, row]))
    if not found:
        raise SystemExit("the two results have no times in common")
    return {name: statistics.fmean(logs) for name, logs in found.items()}


def compare_records(old: Path, new: Path) -> dict[str, Any]:
    """Returns whether the records of two checkouts are the same to the bit, and which parts are not."""
    script = str((new / RECORD).absolute())  # the same questions to both
    before, after = (run(checkout, [script]) for checkout in (old, new))
    return {"same": before == after, "differ": sorted(name for name in after if before.get(name) != after[name])}


def compare_times(old: Path, new: Path, command: list[str], pairs: int) -> dict[str, Any]:
    """Returns the ratio of every time; every second pair runs the new checkout first."""
    found: dict[str, list[float]] = {}
    for pair in range(pairs):
        order = (old, new) if pair % 2 == 0 else (new, old)
        results = {checkout: run(checkout, command) for checkout in order}
        for name, value in log_ratios(results[old], results[new]).items():
            found.setdefault(name, []).append(value)
    ratios = {}
    for name, logs in found.items():
        ratio, ends = exponential_mean(logs)
        ratios[name] = {"ratio": ratio, "ci95": ends, "pairs": len(logs)}
    return {"command": command, "ratios": ratios}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [-h] [--record] [--pairs PAIRS] OLD NEW [-- COMMAND ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", type=Path, help="the checkout that is compared with")
    parser.add_argument("new", type=Path, help="the checkout that is compared")
    parser.add_argument("--record", action="store_true", help="compare the records of tests/golden, to the bit")
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"runs in each, at least two; {PAIRS} by default")
    arguments = sys.argv[1:]
    at = arguments.index("--") if "--" in arguments else len(arguments)
    chosen, command = parser.parse_args(arguments[:at]), arguments[at + 1 :]
    if chosen.pairs < 2 or not (chosen.record or command):
        parser.error("at least two pairs of a command, or --record")
    if chosen.record:
        found = compare_records(chosen.old, chosen.new)
    else:
        found = compare_times(chosen.old, chosen.new, command, chosen.pairs)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
