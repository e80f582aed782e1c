"""What the benchmarks share: options, calls that take turns, runs in a process of their own, and rows as JSON and tables."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from moacompress.core.tables import Table
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.model_shape import ModelShape

Row = dict[str, Any]
"""A result by the names of its numbers, as JSON."""


def options(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser whose help is a script's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def listed(given: str, known: Iterable[str]) -> list[str]:
    """Returns names that were given with commas, or all that are known.

    Raises:
        argparse.ArgumentTypeError: one of them is not known.
    """
    known = list(known)
    asked = given.split(",") if given else known
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of: {', '.join(known)}")
    return asked


def medians_ms(
    runs: Sequence[Callable[[], Any]], times: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Returns the median time of each call, after one that is not counted.

    They take turns: how fast memory is changes from second to second where others use the machine too.
    """
    taken: list[list[float]] = [[] for _ in runs]
    for turn in range(times + 1):
        for run, seconds in zip(runs, taken, strict=True):
            begin = clock()
            run()
            if turn:
                seconds.append(clock() - begin)
    return [statistics.median(seconds) * 1e3 for seconds in taken]


def run_alone(script: str, *arguments: object) -> Row:
    """Returns the object that a script prints, from a new process: its peak of memory is not that of another run."""
    command = [sys.executable, str(Path(script).resolve()), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def append_row(out: Path | None, row: Mapping[str, Any]) -> None:
    """Adds a row to a file of JSON lines, where there is one."""
    if out is not None:
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_rows(path: Path, begin: int = 0) -> list[Row]:
    """Returns the rows of a file of JSON lines, from a byte on; lines that cannot be read are left out, and it is said."""
    rows, lines = [], path.read_bytes()[begin:].splitlines()
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    if len(rows) < len(lines):
        print(f"{path}: {len(lines) - len(rows)} lines cannot be read and are left out", file=sys.stderr)
    return rows


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """Returns rows of text as a table in Markdown, whose other columns are numbers."""
    return Table("", columns, rows, text_columns=text_columns).markdown()


def rows_table(rows: Sequence[Row]) -> str:
    """Returns rows that have the same names as a table in Markdown."""
    return markdown(list(rows[0]), (["" if value is None else str(value) for value in row.values()] for row in rows))


def random_gates(shape: ModelShape, inputs: int) -> GateWeights:
    """Returns random gates of a model whose layers have so many inputs."""
    draw, heads = np.random.default_rng(0), (shape.layers, shape.kv_heads)
    weight, bias = draw.standard_normal((*heads, inputs), np.float32), draw.standard_normal(heads, np.float32)
    return GateWeights(weight, bias)


@contextmanager
def reference_kernels() -> Iterator[None]:
    """Has all attention run in plain PyTorch."""
    from moacompress.kernels import dispatch

    try:
        with patch.dict("os.environ", {dispatch.VARIABLE: dispatch.REFERENCE.name}):
            dispatch.forget()
            yield
    finally:
        dispatch.forget()
