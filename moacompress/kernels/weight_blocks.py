"""Weights that stay in blocks of integer codes with scales, as GGML lays them out: what each type is, in plain PyTorch.

A weight `[outputs, inputs]` is kept as uint8 `[outputs, bytes]`: the blocks of a row lie one behind the other, scales inside.
Numbers are those that the package `gguf` dequantizes, bit for bit in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moacompress.core.errors import UnsupportedError

NATIVE = 0
"""In the place of a type's code: a weight of plain numbers, `[outputs, inputs]`."""


@dataclass(frozen=True)
class WeightType:
    """One type of blocks.

    Attributes:
        name: GGML's.
        code: as the kernels write it; stable.
        numbers: of a block.
        nbytes: of a block.
    """

    name: str
    code: int
    numbers: int
    nbytes: int

    def row_bytes(self, inputs: int) -> int:
        """Returns the bytes of one output's weights.

        Raises:
            UnsupportedError: the inputs do not fill whole blocks.
        """
        if inputs % self.numbers:
            raise UnsupportedError(
                f"{inputs} inputs are no multiple of the {self.numbers} numbers of a {self.name} block; keep this weight dense"
            )
        return inputs // self.numbers * self.nbytes

    def inputs(self, row_bytes: int) -> int:
        """Returns the inputs of a weight whose outputs take `row_bytes` bytes each.

        Raises:
            UnsupportedError: the bytes are not those of whole blocks.
        """
        if row_bytes % self.nbytes:
            raise UnsupportedError(
                f"rows of {row_bytes} bytes are no multiple of the {self.nbytes} of a {self.name} block"
            )
        return row_bytes // self.nbytes * self.numbers


WEIGHT_TYPES = {
    kind.name: kind
    for kind in (
        WeightType("Q8_0", 1, 32, 34),
        WeightType("Q5_0", 2, 32, 22),
        WeightType("Q4_1", 3, 32, 20),
        WeightType("Q4_0", 4, 32, 18),
        WeightType("Q4_K", 5, 256, 144),
        WeightType("Q6_K", 6, 256, 210),
        WeightType("Q5_K", 7, 256, 176),
    )
}
"""The types that products are made with, by their names."""
_BY_CODE = {kind.code: kind for kind in WEIGHT_TYPES.values()}


def weight_type(code: int) -> WeightType:
    """Returns the type with a code.

    Raises:
        UnsupportedError: there is none.
    """
    if code not in _BY_CODE:
        raise UnsupportedError(
            f"no type of weight blocks has the code {code}; known are {min(_BY_CODE)} to {max(_BY_CODE)}"
        )
    return _BY_CODE[code]


def dequantized(blocks: torch.Tensor, kind: WeightType, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns what blocks, uint8 `[..., outputs, bytes]`, stand for, `[..., outputs, inputs]`: made in float32, then rounded.

    All of it is in memory at once, several times over: callers with large weights take some outputs at a time.

    Raises:
        UnsupportedError: the rows are not whole blocks, or no bytes.
    """
    if blocks.dtype != torch.uint8 or not blocks.ndim:
        raise UnsupportedError(f"blocks of weights are uint8 [..., bytes], not {blocks.dtype} {list(blocks.shape)}")
    inputs = kind.inputs(blocks.shape[-1])
    parted = blocks.unflatten(-1, (inputs // kind.numbers, kind.nbytes))
    return _NUMBERS[kind.name](parted).reshape(*blocks.shape[:-1], inputs).to(dtype)


def _halves(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """Returns the float16 that lies at a byte of each block, in float32, `[..., 1]`."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Returns the low nibbles of `[..., bytes]`, then the high ones, `[..., 2 * bytes]`."""
    return torch.cat((codes & 15, codes >> 4), -1)


def _bits(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Returns bytes shifted by multiples of a width and masked to it, `[..., 8 / width, bytes]`."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
    return (codes[..., None, :] >> shifts[:, None]) & ((1 << width) - 1)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[..., 2:].contiguous().view(torch.int8) * _halves(blocks, 0)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return (_nibbles(blocks[..., 2:]).float() - 8) * _halves(blocks, 0)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[..., 4:]) * _halves(blocks, 0) + _halves(blocks, 2)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    fifth = _bits(blocks[..., 2:6], 1).transpose(-1, -2).flatten(-2)  # bit i of the four bytes is that of number i
    return ((_nibbles(blocks[..., 6:]) | fifth << 4).float() - 16) * _halves(blocks, 0)


def _scales_and_minima(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what eight groups of 32 numbers are scaled by, and what is taken from them, `[..., 8, 1]` each.

    Both have six bits. Of the first four groups they are the low ones of a byte each; of the last four there are nibbles in
    four more bytes, and the two bits above them are on top of those bytes.
    """
    scales, minima, nibbles = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    found = (
        torch.cat((six & 63, four | (six >> 2 & 48)), -1).float()
        for six, four in ((scales, nibbles & 15), (minima, nibbles >> 4))
    )
    scale, minimum = (_halves(blocks, at) * part for at, part in zip((0, 2), found, strict=True))
    return scale[..., None], minimum[..., None]


def _nibbles_of_groups(codes: torch.Tensor) -> torch.Tensor:
    """Returns the nibbles of 128 bytes in eight groups, `[..., 8, 32]`: 32 bytes have two groups, the low and the high ones."""
    found: torch.Tensor = _nibbles(codes.unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2)
    return found


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    scale, minimum = _scales_and_minima(blocks)
    return _nibbles_of_groups(blocks[..., 16:]) * scale - minimum


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    scale, minimum = _scales_and_minima(blocks)
    codes = _nibbles_of_groups(blocks[..., 48:]) | _bits(blocks[..., 16:48], 1) << 4
    return codes * scale - minimum


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    low = _nibbles(blocks[..., :128].unflatten(-1, (2, 64)))
    high = _bits(blocks[..., 128:192].unflatten(-1, (2, 32)), 2).flatten(-2)
    codes = (low | high << 4).flatten(-2).float() - 32
    scale = _halves(blocks, 208) * blocks[..., 192:208].contiguous().view(torch.int8)
    numbers: torch.Tensor = codes.unflatten(-1, (16, 16)) * scale[..., None]
    return numbers.flatten(-2)


_NUMBERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q8_0": _q8_0,
    "Q5_0": _q5_0,
    "Q4_1": _q4_1,
    "Q4_0": _q4_0,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
    "Q5_K": _q5_k,
}
