"""Formats between and below ours, in plain PyTorch, for any command or script: which would a search buy, and what do they save?

    python benchmarks/rungs.py -- -m moacompress profile MODEL --set profile.formats=int8,int5,int4,gauss3 -o runs/rungs
    python benchmarks/rungs.py -- -m moacompress search runs/rungs --formats int8,int5,int4 --budget 12.5% -o int5.json
    python benchmarks/rungs.py -- benchmarks/compare_plans.py runs/rungs 12.5=today.json 12.5/int5=int5.json -o rows.json
    python benchmarks/rungs.py -- -m moacompress inspect int5.json

Each is a format of an installed package (`docs/extending.md`), kept by the reference. `int3` and `int5` are codes as
`docs/formats.md` has them, with a scale and a zero point. `gauss2` and `gauss3` are the nearest of the four or eight numbers
that represent a normal distribution best, times one float16 that is fitted to the vector, in the same rotated basis.
"""

from __future__ import annotations

import runpy
import sys
from unittest.mock import patch

import numpy as np
import torch
from harness import options, reference_kernels  # beside this script
from scipy.stats import norm

from moacompress.core import plugins
from moacompress.kernels.kv_format import KVFormat
from moacompress.kernels.reference.codes import Codes, decode, encode, rotated, stored

ROUNDS = 500
"""Of Lloyd's algorithm, by which the numbers of two and three bits have settled."""


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
        bits = np.unpackbits(codes.numpy()[..., None], axis=-1, count=self.bits, bitorder="little")
        packed = torch.from_numpy(
            np.packbits(bits.reshape(len(bits), vectors.shape[1] * self.bits), axis=1, bitorder="little")
        )
        return torch.cat((*(number.contiguous().view(torch.uint8) for number in numbers), packed), 1)

    def decode(self, kept: torch.Tensor, dim: int) -> torch.Tensor:
        """See `KVFormat`."""
        numbers = [kept[:, 2 * i : 2 * i + 2].contiguous().view(torch.float16) for i in range(self.numbers)]
        packed = kept[:, 2 * self.numbers :].numpy()
        bits = np.unpackbits(packed, axis=1, count=dim * self.bits, bitorder="little").reshape(-1, dim, self.bits)
        codes = torch.from_numpy(np.packbits(bits, axis=-1, bitorder="little")[..., 0])
        return rotated(self.meant(codes, *numbers))

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


RUNGS = (Rung("int5", 5), Rung("int3", 3), Gauss(3), Gauss(2))


def main() -> None:
    """Runs a command with these formats installed and the reference as kernel."""
    installed = plugins.plugins

    def with_rungs(group: str) -> tuple[tuple[str, object], ...]:
        own = tuple((rung.name, rung) for rung in RUNGS) if group == plugins.FORMATS else ()
        return (*installed(group), *own)

    parser = options(__doc__)
    parser.add_argument(
        "command", nargs="+", help="after --: what follows Python's name, `-m MODULE ...` or `SCRIPT ...`"
    )
    first, *rest = parser.parse_args().command
    with reference_kernels(), patch.object(plugins, "plugins", with_rungs):
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *rest]
            runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    main()
