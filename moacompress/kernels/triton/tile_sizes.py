"""How large the tiles of the kernels are, from a table: what is compiled never depends on a measurement.

Nor does it depend on lengths, counts and widths, which are in each kernel's `do_not_specialize`. It does on strides: vectors
are read 16 bytes at a time where those are known to be multiples of 16, as they are for every length where head dimensions are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from moacompress.kernels.kv_parts import KVPart
from moacompress.kernels.triton.cards import KIB, Card

SMALLEST = 16
"""Of each side of a product of matrices."""
LARGEST = 64
"""Tokens of the largest tile."""
APPEND_WARPS = 1
"""Of a program of `append_kernels.append`, which writes one token of a KV head."""
MERGE_WARPS = 4
"""Of a program of `decode_kernels.merge`."""
PARTS = 16
"""Results of parts that it adds up at once."""
SELECT_WARPS = 4
"""Of a program of `select_kernels`."""
SELECT_TILE = 512
"""Scores that such a program looks at at once."""
TRANSIENT_TILE = 16
"""Selected tokens that a chunk attends to at once."""
ROOMY = 128 * KIB
"""Bytes of shared memory of a program that hold the largest tiles of a chunk."""
FLOAT32 = 4
"""Bytes of a number that cards multiply one by one, which takes registers: tiles are small."""
LANES = 256
"""Of a program with heads of many numbers."""


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

    @property
    def options(self) -> dict[str, int]:
        """What a launch is given beside arguments: stages for loops that do not name their own."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def decode_tiles(head_dim: int, value_dim: int, item_size: int, coded: bool, card: Card) -> TileSizes:
    """Returns the tiles of a decode step.

    `item_size` is that of what is multiplied: 4 bytes where that is float32. Keys or values that are `coded` take more
    registers.
    """
    wide = max(head_dim, value_dim) * item_size
    if coded and item_size == FLOAT32 and not card.interpreted:
        return TileSizes(SMALLEST, 2, 8)
    if wide <= 256:
        # fewer warps repeat less of what is the same for all queries: scales, zero points and bounds
        return TileSizes(LARGEST, 3, 2 if coded else 4)
    if wide <= 512:
        return TileSizes(32, 3, 4)
    return TileSizes(SMALLEST, 2, 4)


def split_constants(
    group: int,
    head_dim: int,
    value_dim: int,
    bits: tuple[int, int],
    *,
    softcap: bool,
    wide: bool,
    item_size: int,
    card: Card,
    ring: bool = False,
    keep: bool = False,
    reuse: bool = False,
) -> tuple[TileSizes, dict[str, int | bool]]:
    """Returns the tiles of `decode_kernels.split`, and all that it is compiled for, by the names of its arguments.

    `bits` are those of a code of keys and of values, 0 of native numbers; `wide` says whether products are in float32,
    `item_size` how many bytes the query's numbers have.
    """
    tiles = decode_tiles(head_dim, value_dim, FLOAT32 if wide else item_size, any(bits) and not reuse, card)
    sides = _side_constants(group, head_dim, value_dim, bits, softcap=softcap, wide=wide)
    return tiles, {
        **sides,
        "GROUP": padded(group),
        "TILE": tiles.TILE,
        "STAGES": tiles.num_stages,
        "RING": ring,
        "KEEP": keep,
        "REUSE": reuse,
    }


def merge_constants(group: int, value_dim: int, *, logits: bool) -> dict[str, int | bool]:
    """Returns all that `decode_kernels.merge` is compiled for, by the names of its arguments."""
    return {"G": group, "VALUE_DIM": value_dim, "VALUE": padded(value_dim), "LOGITS": logits, "PARTS": PARTS}


def _side_constants(
    group: int, head_dim: int, value_dim: int, bits: tuple[int, int], *, softcap: bool, wide: bool
) -> dict[str, int | bool]:
    """Returns what all attention is compiled for."""
    head, value = (
        padded(-(-dim // 2) if each == 4 else dim) for dim, each in zip((head_dim, value_dim), bits, strict=True)
    )
    return {
        "G": group,
        "HEAD_DIM": head_dim,
        "HEAD": head,
        "VALUE_DIM": value_dim,
        "VALUE": value,
        "KEY_BITS": bits[0],
        "VALUE_BITS": bits[1],
        "SOFTCAP": softcap,
        "WIDE": wide,
    }


def rotation_norm(dim: int) -> float:
    """Returns the factor of a rotation of vectors of so many numbers, as a float32."""
    return float(np.float32((dim & -dim) ** -0.5))


def prefill_tiles(head_dim: int, value_dim: int, item_size: int, coded: bool, card: Card) -> tuple[TileSizes, int]:
    """Returns the tiles of a chunk, and how many queries one has, those of a group counted each; see `decode_tiles`."""
    if item_size == FLOAT32 and not card.interpreted:
        return TileSizes(SMALLEST, 2, LANES // card.lanes), SMALLEST
    if max(head_dim, value_dim) > 128:
        return TileSizes(32, 2, LANES // card.lanes), SMALLEST
    if not card.large:
        return TileSizes(32, 2, 4), 32
    if coded or (max(head_dim, value_dim) > 64 and card.shared < ROOMY):
        return TileSizes(32, 3, 4), 64
    return decode_tiles(head_dim, value_dim, item_size, False, card), 64


def prefill_constants(
    group: int,
    head_dim: int,
    value_dim: int,
    bits: tuple[int, int],
    *,
    softcap: bool,
    logits: bool,
    cached: bool,
    transient: bool,
    wide: bool,
    item_size: int,
    card: Card,
) -> tuple[TileSizes, dict[str, int | bool]]:
    """Returns the tiles of `prefill_kernels.attend_chunk`, and all that it is compiled for but CAREFUL, by their names.

    `cached` says whether some row has a past, `transient` whether there are selected tokens; the rest is as of
    `split_constants`.
    """
    tiles, rows = prefill_tiles(head_dim, value_dim, FLOAT32 if wide else item_size, any(bits), card)
    together = 1 << (group - 1).bit_length()
    return tiles, {
        **_side_constants(group, head_dim, value_dim, bits, softcap=softcap, wide=wide),
        "GROUP": together,
        "TOKENS": max(rows // together, 1),
        "LOGITS": logits,
        "CACHED": cached,
        "TRANSIENT": transient,
        "TRANSIENT_TILE": TRANSIENT_TILE,
        "TILE": tiles.TILE,
        "STAGES": tiles.num_stages,
    }


def padded(size: int) -> int:
    """Returns the smallest power of two that holds so many, and is enough for a product of matrices."""
    return max(SMALLEST, 1 << max(size - 1, 0).bit_length())


def append_constants(key: KVPart | None, value: KVPart) -> dict[str, Any]:
    """Returns all that `append_kernels.append` is compiled for, by the names of its arguments."""
    first = key or value
    return {
        **move_constants(first, value),
        "KEY_NORM": rotation_norm(first.dim),
        "VALUE_NORM": rotation_norm(value.dim),
        "WITH_KEYS": key is not None,
    }


def append_next_constants(key: KVPart | None, value: KVPart, *, scored: bool) -> dict[str, Any]:
    """Returns all that `append_kernels.append_next` is compiled for, by the names of its arguments.

    There is no key where a layer that shares keys writes its values, after those whose they are.
    """
    return {**append_constants(key, value), "SCORED": scored, "COUNTED": key is None}


def select_constants(key: KVPart, value: KVPart, *, ring: bool = False) -> dict[str, Any]:
    """Returns all that `select_kernels.select` is compiled for, by the names of its arguments."""
    return {**move_constants(key, value), "TILE": SELECT_TILE, "RING": ring}


def move_constants(key: KVPart, value: KVPart) -> dict[str, Any]:
    """Returns all that `select_kernels.move` is compiled for, by the names of its arguments."""
    return {
        "HEAD_DIM": key.dim,
        "HEAD": padded(key.dim),
        "VALUE_DIM": value.dim,
        "VALUE": padded(value.dim),
        "KEY_BITS": key.bits,
        "VALUE_BITS": value.bits,
    }
