"""How large the tiles of the kernels are, from a table: what is compiled never depends on a measurement."""

from __future__ import annotations

from typing import NamedTuple

SMALLEST = 16
"""Of each side of a product of matrices."""
LARGEST = 64
"""Tokens of the largest tile."""


class TileSizes(NamedTuple):
    """The constants of a compiled kernel.

    Attributes:
        TILE: tokens that are attended to at once, whole blocks.
        num_stages: tiles that are read ahead.
        num_warps: of a program.
    """

    TILE: int
    num_stages: int
    num_warps: int


def decode_tiles(head_dim: int, value_dim: int, item_size: int, coded: bool) -> TileSizes:
    """Returns the tiles of a decode step.

    Args:
        head_dim: numbers of a key.
        value_dim: numbers of a value.
        item_size: bytes of what is multiplied: 4 where that is float32.
        coded: whether keys or values have codes, which take more registers.
    """
    wide = max(head_dim, value_dim) * item_size
    if wide <= (128 if coded else 256):
        return TileSizes(LARGEST, 3, 4)
    if wide <= 512:
        return TileSizes(32, 3, 4)
    return TileSizes(SMALLEST, 2, 4)


def padded(size: int) -> int:
    """Returns the smallest power of two that holds so many, and is enough for a product of matrices."""
    return max(SMALLEST, 1 << max(size - 1, 0).bit_length())
