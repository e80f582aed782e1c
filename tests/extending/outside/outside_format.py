"""A format of another package: floats of 8 bits and one scale for each vector, in one file."""

from __future__ import annotations

import torch

from moacompress.kernels.kv_format import KVFormat

LARGEST = 448.0
"""Of `torch.float8_e4m3fn`."""
SCALE = 4
"""Bytes of a scale, float32."""


class Fp8(KVFormat):
    """Every number as a float of 8 bits, by the scale of its vector."""

    name, bits = "fp8", 8

    def vector_bytes(self, dim: int, dtype: str) -> int:
        """Returns a byte for each number, and those of the scale."""
        return dim + SCALE

    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        """Returns the floats and behind them the scale."""
        scale = vectors.float().abs().amax(-1, keepdim=True) / LARGEST
        numbers = torch.where(scale == 0, 0, vectors.float() / scale).to(torch.float8_e4m3fn)
        return torch.cat((numbers.view(torch.uint8), scale.view(torch.uint8)), -1)

    def decode(self, kept: torch.Tensor, dim: int) -> torch.Tensor:
        """Returns the floats times the scale."""
        scale = kept[:, dim:].contiguous().view(torch.float32)
        return kept[:, :dim].contiguous().view(torch.float8_e4m3fn).float() * scale


class Taken(Fp8):
    """A format with a name of ours."""

    name = "int8"


FP8, TAKEN = Fp8(), Taken()
