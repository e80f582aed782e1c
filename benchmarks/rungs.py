"""`moacompress` with formats between and below ours, which the reference keeps: which of them a search buys.

    MOACOMPRESS_KERNEL=reference python benchmarks/rungs.py profile MODEL --recipe rungs.yaml -o P
    MOACOMPRESS_KERNEL=reference python benchmarks/rungs.py search P --budget 12.5% -o plan.json

`int6`, `int5` and `int3` are codes as ours are, between a vector's least and largest number. `gauss3` and `gauss2` are
the nearest of 8 or 4 centroids of a normal distribution (Lloyd, 1982; Max, 1960), times a scale that is fitted to the vector.
"""

from __future__ import annotations

from unittest import mock

import numpy as np
import torch

from moacompress.cli import app
from moacompress.core import plugins
from moacompress.kernels.kv_format import KVFormat
from moacompress.kernels.reference.codes import Codes, decode, encode, rotated, stored

CENTROIDS = {3: (14, 45, 79, 127), 2: (38, 127)}
"""Of the upper half of a normal distribution, by bits: integers that a kernel multiplies."""
DEVIATION = {3: 59.0, 2: 84.1}
"""Standard deviation of that distribution, in the same units."""
FITS = 2
"""Times that codes and scale are fitted to each other."""


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns codes, uint8 `[tokens, dim]`, one after the other in as few words of 4 bytes as hold a row."""
    rows = np.unpackbits(codes.numpy()[..., None], axis=-1)[..., -bits:].reshape(len(codes), -1)
    return torch.from_numpy(np.packbits(np.pad(rows, ((0, 0), (0, -rows.shape[1] % 32))), axis=-1))


def unpacked(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Returns the codes of `packed`."""
    rows = np.unpackbits(words.numpy(), axis=-1)[:, : dim * bits].reshape(len(words), dim, bits)
    return torch.from_numpy(np.packbits(np.pad(rows, ((0, 0), (0, 0), (8 - bits, 0))), axis=-1)[..., 0])


def as_bytes(*numbers: torch.Tensor) -> torch.Tensor:
    """Returns float16 numbers of each row as bytes."""
    return torch.cat(numbers, -1).contiguous().view(torch.uint8)


class Between(KVFormat):
    """Codes from a vector's least number to its largest."""

    def __init__(self, bits: int) -> None:
        self.name, self.bits = f"int{bits}", bits

    def vector_bytes(self, dim: int, dtype: str) -> int:
        """Returns the bytes of codes, a scale and a zero point."""
        return -(-dim * self.bits // 32) * 4 + 4

    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        """Returns scale and zero point, then the codes."""
        kept = encode(vectors, self.bits)
        return torch.cat((as_bytes(kept.scale, kept.zero), packed(kept.codes, self.bits)), -1)

    def decode(self, kept: torch.Tensor, dim: int) -> torch.Tensor:
        """Returns the vectors."""
        scale, zero = kept[:, :4].contiguous().view(torch.float16).split(1, -1)
        return rotated(decode(Codes(unpacked(kept[:, 4:], self.bits, dim), scale, zero)))


class Gaussian(KVFormat):
    """The nearest centroids of a normal distribution, times a fitted scale."""

    def __init__(self, bits: int) -> None:
        self.name, self.bits = f"gauss{bits}", bits
        half = torch.tensor(CENTROIDS[bits], dtype=torch.float32)
        self.centroids = torch.cat((-half.flip(0), half))

    def vector_bytes(self, dim: int, dtype: str) -> int:
        """Returns the bytes of codes and a scale."""
        return -(-dim * self.bits // 32) * 4 + 2

    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        """Returns the scale, then the codes."""
        y = rotated(vectors)
        bad = ~y.isfinite().all(-1, keepdim=True)
        y = y.masked_fill(bad, 0)
        scale = y.square().mean(-1, keepdim=True).sqrt() / DEVIATION[self.bits]
        edges = (self.centroids[1:] + self.centroids[:-1]) / 2
        for _ in range(FITS):
            codes = torch.bucketize(y / scale.clamp_min(1e-12), edges)
            chosen = self.centroids[codes]
            scale = stored((y * chosen).sum(-1, keepdim=True) / chosen.square().sum(-1, keepdim=True)).float()
        kept = scale.masked_fill(bad, torch.nan).half()
        return torch.cat((as_bytes(kept), packed(codes.to(torch.uint8), self.bits)), -1)

    def decode(self, kept: torch.Tensor, dim: int) -> torch.Tensor:
        """Returns the vectors."""
        scale = kept[:, :2].contiguous().view(torch.float16).float()
        return rotated(self.centroids[unpacked(kept[:, 2:], self.bits, dim).long()] * scale)


RUNGS = (Between(6), Between(5), Between(3), Gaussian(3), Gaussian(2))


def main() -> None:
    """Runs a command of `moacompress` where the rungs are formats of an installed package."""
    installed = plugins.plugins

    def with_rungs(group: str) -> tuple[tuple[str, object], ...]:
        added = [(rung.name, rung) for rung in RUNGS] if group == plugins.FORMATS else []
        return (*installed(group), *added)

    with mock.patch.object(plugins, "plugins", with_rungs):
        app()


if __name__ == "__main__":
    main()
