"""The targets of a GPU run: ratios that rows of one run answer, each met, not met or not measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gpu_sizes import CODED, FULL, LARGE, PAIRS, PLAIN, QUARTER, Sizes
from harness import Row  # beside this script

TARGETS = "targets"
"""Of what part they are rows."""
NOT_MEASURED = "not measured"


class Target(NamedTuple):
    """What is wanted of a run: at least so much, or `at_most`; `measured` is None where the results do not say."""

    name: str
    wanted: float
    at_most: bool
    measured: float | None

    def row(self) -> Row:
        """Returns the target as a row of results."""
        sign = "<=" if self.at_most else ">="
        row: Row = {"part": TARGETS, "what": self.name, "wanted": f"{sign} {self.wanted:g}"}
        if self.measured is None:
            return row | {"measured": NOT_MEASURED, "met": NOT_MEASURED}
        met = self.measured <= self.wanted if self.at_most else self.measured >= self.wanted
        return row | {"measured": self.measured, "met": "yes" if met else "no"}


class Results:
    """The rows of a run, by part and name."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = {(row["part"], row["what"]): row for row in rows}

    def number(self, part: str, what: str, name: str) -> float | None:
        """Returns a number of a row; None where there is none."""
        value = self._rows.get((part, what), {}).get(name)
        return None if value is None else float(value)

    def ratio(self, part: str, over: str, under: str, name: str) -> float | None:
        """Returns a number of one row as a multiple of that of another; None where one is not there."""
        a, b = self.number(part, over, name), self.number(part, under, name)
        return a / b if a is not None and b else None

    def all_right(self, part: str, contains: str) -> float | None:
        """Returns the share of rows that are right, of those whose name has a text; None where one was not measured."""
        rows = [row for (of, what), row in self._rows.items() if of == part and contains in what]
        if not rows or any("right" not in row and "failed" not in row for row in rows):
            return None
        return sum(bool(row.get("right")) for row in rows) / len(rows)


def targets(rows: Sequence[Row], sizes: Sizes = LARGE) -> list[Row]:
    """Returns a row for each target, of the results of a run on a GPU."""
    return [target.row() for target in _targets(Results(rows), sizes)]


def _targets(found: Results, sizes: Sizes) -> Iterator[Target]:
    rows, tokens = sizes.cells[0]

    def ring(pair: tuple[str, str]) -> str:
        return f"{rows} x {tokens:,} {'/'.join(pair)}, a step in rings"

    def per_second(side: str) -> str:
        return f"{sizes.batch:,} tokens, {side}, its largest batch"

    yield Target(
        "decode, bfloat16: share of copying", 0.85, False, found.number("decode", ring(PAIRS[0]), "share_of_ceiling")
    )
    for pair, wanted in zip(PAIRS[1:], (1.7, 2.1, 2.5), strict=True):
        times = found.ratio("decode", ring(PAIRS[0]), ring(pair), "us")
        yield Target(f"decode, {'/'.join(pair)}: times as fast as bfloat16", wanted, False, times)
    for count, length in sizes.cells:
        for side in (QUARTER, CODED):
            share = _share_of_possible(found, f"{count} x {length:,} {side}", f"{count} x {length:,} {FULL}")
            yield Target(f"{count} x {length:,}, {side}: share of R over full span, both graphs", 0.9, False, share)
    count, length = sizes.longest
    beside = found.ratio("e2e", f"{count} x {length:,} {PLAIN}", f"{count} x {length:,} {QUARTER}", "ms")
    yield Target(f"{count} x {length:,}: times as fast as plain transformers", 4, False, beside)
    native = found.ratio("e2e", per_second(QUARTER), per_second(PLAIN), "tokens/s")
    yield Target("tokens a second at the largest batch: times those of plain transformers", 8, False, native)
    coded = found.ratio("e2e", per_second(CODED), per_second(QUARTER), "tokens/s")
    yield Target("the same, 8/4: times those of the native quarter", 1, False, coded)
    for prompt in sizes.prompts:
        share = found.number("prefill", f"{prompt:,} tokens, a quarter", "x visible share")
        yield Target(f"prefill of {prompt:,}: times the visible share of FlashAttention-2", 1.1, True, share)
    yield Target(
        f"{sizes.replayed} replayed steps are the steps: share of plans",
        1,
        False,
        found.all_right("correct", " steps,"),
    )
    yield Target(
        "no waits of the host in a step: share of plans", 1, False, found.all_right("correct", "waits of the host")
    )
    yield Target("kernels as plain PyTorch: share", 1, False, found.all_right("correct", "decode "))
    yield Target("logits as plain PyTorch's: share", 1, False, found.all_right("correct", "logits "))


def _share_of_possible(found: Results, side: str, full: str) -> float | None:
    """Returns how many times as fast as full span a side is, as a share of R: by how many times fewer bytes it reads."""
    faster, fewer = (found.ratio("e2e", full, side, name) for name in ("ms", "bytes"))
    if faster is None or fewer is None or not all(found.number("e2e", name, "graph") for name in (side, full)):
        return None
    return faster / fewer
