"""Keys and values as integer codes with a scale and a zero point of each vector: `docs/formats.md`, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch

LARGEST = 65504.0
"""Of float16: scales and zero points beyond it are this."""


class Codes(NamedTuple):
    """Vectors as they are kept, in the rotated basis.

    Attributes:
        codes: uint8 `[..., dim]`.
        scale: float16 `[..., 1]`.
        zero: float16 `[..., 1]`.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Returns `H x` in float32, `[..., dim]`: Hadamard matrices of the largest power of two that divides `dim`.

    It is its own inverse.
    """
    dim = x.shape[-1]
    block = dim & -dim
    y = x.float()
    if block == 1:
        return y
    stage = 1
    while stage < block:
        low, high = y.view(*x.shape[:-1], dim // (2 * stage), 2, stage).unbind(-2)
        y = torch.stack((low + high, low - high), -2).view(x.shape)
        stage *= 2
    norm = torch.tensor(block**-0.5, dtype=torch.float32, device="cpu")  # a number, which other devices take from there
    return y * norm


def encode(x: torch.Tensor, bits: int) -> Codes:
    """Returns the codes of vectors `[..., dim]`, of 1 to 8 bits; float64 is rounded to float32 first."""
    levels, y = (1 << bits) - 1, rotated(x)
    zero, scale = map(stored, _zero_and_scale(y, levels))
    nonfinite = scale.isnan()
    inverse = torch.where(scale == 0, 0, 1 / scale.float())
    codes = torch.round((y - zero.float()) * inverse).clamp(0, levels)
    return Codes(codes.masked_fill(nonfinite, 0).to(torch.uint8), scale, zero)


def is_clipped(x: torch.Tensor, bits: int) -> bool:
    """Returns whether some finite vectors, `[..., dim]`, have a scale or a zero point beyond what float16 holds."""
    parts = _zero_and_scale(rotated(x), (1 << bits) - 1)
    return any(bool((part.abs() > LARGEST).any()) for part in parts)


def _zero_and_scale(y: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns zero points and scales of rotated vectors, float32 `[..., 1]`; NaN for a vector that is not finite."""
    # adding makes a minus zero a plus
    low, high = (bound(-1, keepdim=True) + 0.0 for bound in (y.amin, y.amax))
    nonfinite = ~y.isfinite().all(-1, keepdim=True)
    return low.masked_fill(nonfinite, torch.nan), ((high - low) / levels).masked_fill(nonfinite, torch.nan)


def decode(kept: Codes) -> torch.Tensor:
    """Returns what codes stand for, float32 `[..., dim]`, in the rotated basis; `rotated` brings it back."""
    return kept.scale.float() * kept.codes.float() + kept.zero.float()


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns a vector's codes, uint8 `[..., dim]`, as bytes, uint8 `[..., bytes]`.

    Of 4 bits the first half of a vector is in the low nibbles and the second in the high ones. Of 6 bits four parts of whole
    words of 4 share three rows of bytes: the first three are in the low bits of a row each, and the fourth in the high bits.
    """
    if bits == 8:
        return codes
    if bits == 6:
        row = 4 * -(-codes.shape[-1] // 16)
        parts = torch.nn.functional.pad(codes, (0, 4 * row - codes.shape[-1])).unflatten(-1, (4, row))
        rows: torch.Tensor = parts[..., :3, :] | ((parts[..., 3:, :] >> _high_bits(codes)) & 3) << 6
        return rows.flatten(-2)
    half = -(-codes.shape[-1] // 2)
    low, high = codes[..., :half], codes[..., half:]
    return low | (torch.nn.functional.pad(high, (0, half - high.shape[-1])) << 4)


def unpack(packed: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Returns the codes of `pack`, uint8 `[..., dim]`; bytes behind them are passed over."""
    if bits == 8:
        return packed[..., :dim]
    if bits == 6:
        rows = packed.unflatten(-1, (3, -1))
        fourth = ((rows >> 6) << _high_bits(packed)).sum(-2, keepdim=True, dtype=torch.uint8)
        return torch.cat((rows & 63, fourth), -2).flatten(-2)[..., :dim]
    half = packed[..., : -(-dim // 2)]
    return torch.cat((half & 15, half >> 4), -1)[..., :dim]


def _high_bits(like: torch.Tensor) -> torch.Tensor:
    """Returns by how much the bits of a fourth part are shifted that are in each of three rows, uint8 `[3, 1]`."""
    return torch.tensor([[0], [2], [4]], dtype=torch.uint8, device=like.device)


def stored(x: torch.Tensor) -> torch.Tensor:
    """Returns scales or zero points as they are kept, float16."""
    return x.clamp(-LARGEST, LARGEST).half()
