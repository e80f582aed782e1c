"""What queries attend to where keys and values are kept in formats: rounded by `codes`, differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moacompress.kernels.kv_format import outside_of, rounded_by
from moacompress.kernels.reference.codes import decode, encode, rotated
from moacompress.rules.formats import FORMATS, Integer

BITS = {format.code: format.bits for format in FORMATS.values() if isinstance(format, Integer)}
"""Bits of a code of every format of ours that has codes, by the format's own code in a rule table."""


def rounded(x: torch.Tensor, formats: Sequence[int]) -> torch.Tensor:
    """Returns keys or values, `[rows, kv_heads, tokens, dim]`, as the formats of their KV heads keep them, in float32.

    Keys are after their rotary embedding, and results are not rotated. The gradient passes straight through: that of `x` is the
    one of what was returned. Vectors with a NaN or an infinity are NaN, but for heads of the native format, which stay as they
    are.
    """
    if len(formats) != x.shape[1]:
        raise ValueError(f"{len(formats)} formats for {x.shape[1]} KV heads")
    found = x.detach().float()
    for code in sorted(set(formats) - {0}):
        heads = [head for head, wanted in enumerate(formats) if wanted == code]
        outside, own = outside_of(code), x.detach()[:, heads]
        kept = round_to(own, BITS[code]) if outside is None else rounded_by(outside, own)
        found = found.index_copy(1, torch.tensor(heads, device=x.device), kept)
    straight: torch.Tensor = _StraightThrough.apply(x, found)  # type: ignore[no-untyped-call]
    return straight


def as_kept(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, formats: tuple[Sequence[int], Sequence[int]] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns what to attend with under native rules so that it is as with formats: keys and values rounded, all in float32.

    `formats` are the codes of those of keys and of values, `[kv_heads]` each; None, and nothing is done, for native ones.
    """
    if formats is None:
        return query, key, value
    return query.float(), rounded(key, formats[0]), rounded(value, formats[1])


def round_to(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns what codes of so many bits stand for, float32 `[..., dim]`, not rotated; without a gradient's way."""
    return rotated(decode(encode(x, bits)))


class _StraightThrough(torch.autograd.Function):
    """Gives the second argument and hands its gradient to the first."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        """Returns what was found."""
        ctx.dtype = x.dtype
        return found.view_as(found)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Returns the gradient in the dtype of `x`."""
        return grads[0].to(ctx.dtype), None
