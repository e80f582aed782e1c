"""Formats between and below ours, in plain PyTorch, for any command or script: which would a search buy, and what do they save?

    python benchmarks/rungs.py -- -m moacompress profile MODEL --set profile.formats=int8,int6,int4,gauss3 -o runs/rungs
    python benchmarks/rungs.py -- -m moacompress search runs/rungs --formats int8,int6,int4 --budget 12.5% -o int6.json
    python benchmarks/rungs.py -- benchmarks/compare_plans.py runs/rungs 12.5=today.json 12.5/int6=int6.json -o rows.json
    python benchmarks/rungs.py --bought today.json int6.json

Each is a format of an installed package (`docs/extending.md`), kept by the reference. `int3`, `int5` and `int6` are codes as
`docs/formats.md` has them, with a scale and a zero point. `gauss2` and `gauss3` are the nearest of the four or eight numbers
that represent a normal distribution best, times one float16 that is fitted to the vector, in the same rotated basis.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch
from harness import markdown, options  # beside this script
from scipy.stats import norm

from moacompress.core import plugins
from moacompress.kernels.dispatch import REFERENCE, VARIABLE
from moacompress.kernels.kv_format import KVFormat
from moacompress.kernels.reference.codes import Codes, decode, encode, rotated, stored
from moacompress.rules.plan import Plan

ROUNDS = 500
"""Of Lloyd's algorithm; the numbers move by less than 1e-5 then."""


class Rung(KVFormat):
    """Codes of so many bits, packed bit by bit, behind the numbers of their vector in float16."""

    numbers = 2

    def __init__(self, name: str, bits: int) -> None:
        self.name, self.bits = name, bits

    def vector_bytes(self, dim: int, dtype: str) -> int:
        """Returns the bytes of the numbers and of the packed codes."""
        return 2 * self.numbers + -(-dim * self.bits // 8)

    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        """See `KVFormat`."""
        codes, *numbers = self.codes(vectors)
        bits = codes[..., None] >> torch.arange(self.bits, dtype=torch.uint8) & 1
        bits = torch.nn.functional.pad(bits.flatten(1), (0, -bits[0].numel() % 8)).unflatten(1, (-1, 8))
        packed = (bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
        return torch.cat((*(number.contiguous().view(torch.uint8) for number in numbers), packed), 1)

    def decode(self, kept: torch.Tensor, dim: int) -> torch.Tensor:
        """See `KVFormat`."""
        numbers = [kept[:, 2 * i : 2 * i + 2].contiguous().view(torch.float16) for i in range(self.numbers)]
        bits = (kept[:, 2 * self.numbers :, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)
        codes = bits[:, : dim * self.bits].unflatten(1, (dim, self.bits)) << torch.arange(self.bits, dtype=torch.uint8)
        return rotated(self.meant(codes.sum(-1, dtype=torch.uint8), *numbers))

    def codes(self, vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns codes, uint8 `[tokens, dim]`, and numbers, float16 `[tokens, 1]` each."""
        return encode(vectors, self.bits)

    def meant(self, codes: torch.Tensor, *numbers: torch.Tensor) -> torch.Tensor:
        """Returns the rotated vectors that codes and numbers stand for, float32 `[tokens, dim]`."""
        return decode(Codes(codes, *numbers))


class Gauss(Rung):
    """The nearest representative of a normal distribution, times one number."""

    numbers = 1

    def __init__(self, bits: int) -> None:
        super().__init__(f"gauss{bits}", bits)
        self.centroids = torch.tensor(representatives(1 << bits), dtype=torch.float32)

    def codes(self, vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The number is the one of least squares for the codes."""
        y = rotated(vectors)
        spread = y.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
        codes = torch.bucketize(y / spread, (self.centroids[1:] + self.centroids[:-1]) / 2)
        nearest = self.centroids[codes]
        fitted = (y * nearest).sum(-1, keepdim=True) / nearest.square().sum(-1, keepdim=True)
        fitted = fitted.masked_fill(~y.isfinite().all(-1, keepdim=True), torch.nan)
        return codes.to(torch.uint8), stored(fitted)

    def meant(self, codes: torch.Tensor, *numbers: torch.Tensor) -> torch.Tensor:
        """See `Rung`."""
        return self.centroids[codes.long()] * numbers[0].float()


def representatives(count: int) -> list[float]:
    """Returns so many numbers that a standard normal variable is nearest to with the least squared error (Lloyd, Max)."""
    found = norm.ppf([(i + 0.5) / count for i in range(count)])
    for _ in range(ROUNDS):
        edges = [-float("inf"), *((found[1:] + found[:-1]) / 2), float("inf")]
        found = (norm.pdf(edges[:-1]) - norm.pdf(edges[1:])) / (norm.cdf(edges[1:]) - norm.cdf(edges[:-1]))
    return [float(number) for number in found]


RUNGS = (Rung("int6", 6), Rung("int5", 5), Rung("int3", 3), Gauss(3), Gauss(2))


def bought(files: list[str]) -> str:
    """Returns how many KV heads of each plan keep keys and values in each format, as a table."""
    rows = []
    for file in files:
        rules = [rule for row in Plan.load(file).rules for rule in row]
        sides = [Counter(getattr(rule, side) for rule in rules) for side in ("key_format", "value_format")]
        rows.append([Path(file).stem, *(", ".join(f"{n} {name}" for name, n in side.most_common()) for side in sides)])
    return markdown(["plan", "keys", "values"], rows, text_columns=3)


def main() -> None:
    """Runs a command with these formats installed and the reference as kernel."""
    installed = plugins.plugins

    def with_rungs(group: str) -> tuple[tuple[str, object], ...]:
        own = tuple((rung.name, rung) for rung in RUNGS) if group == plugins.FORMATS else ()
        return (*installed(group), *own)

    parser = options(__doc__)
    parser.add_argument("--bought", nargs="+", metavar="PLAN", help="run nothing; print which formats plans have")
    parser.add_argument(
        "command", nargs="*", help="after --: what follows Python's name, `-m MODULE ...` or `SCRIPT ...`"
    )
    given = parser.parse_args()
    os.environ[VARIABLE] = REFERENCE.name
    with patch.object(plugins, "plugins", with_rungs):
        match given.command:
            case ["-m", module, *rest]:
                sys.argv = [module, *rest]
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            case [script, *rest]:
                sys.argv = [script, *rest]
                runpy.run_path(script, run_name="__main__")
            case _ if given.bought:
                print(bought(given.bought))
            case _:
                parser.error("give a command after --, or --bought")


if __name__ == "__main__":
    main()
