"""What it would cost to keep a layer's keys and values in other formats, from the gradients that a backward pass has anyway.

With the gradient dK of keys as they are cached, after their rotary embedding, and the change dk_j that a format makes to the
key of token j, the logits move along the cotangent by `dK_j . dk_j` to first order. Rounding errors of tokens are independent,
so the predicted KL of a format is half of the expected `sum_j (dK_j . dk_j)^2`, and the same for values.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from moacompress.calibration.profile.statistics import SIDES
from moacompress.calibration.profile.tiles import CachedPart
from moacompress.kernels.kv_format import KVFormat, outside_of, rounded_by
from moacompress.kernels.reference.codes import rotated, stored
from moacompress.kernels.reference.rounding import BITS
from moacompress.rules.formats import NATIVE, find_format

TOKENS = 256
"""Tokens worked on at a time, so that everything stays in the processor's caches."""


def columns(formats: Sequence[str]) -> tuple[str, ...]:
    """Returns what the last axis of the statistics is: the native format, then the others."""
    return (NATIVE, *formats)


class PrecisionSums:
    """The sums of one backward pass that the influence of formats is made of.

    There is one of each for keys and for values, `[kv_heads, 1 + formats]`, the native format first.

    `squares`: `sum_j (dK_j . dk_j)^2` over tokens.
    `total`: `sum_j dK_j . dk_j`, with its sign.
    """

    def __init__(
        self,
        kv_heads: int,
        formats: Sequence[str],
        device: torch.device | str = "cpu",
    ) -> None:
        codes = [find_format(name).code for name in columns(formats)]
        self._kinds = [outside_of(code) or BITS[code] for code in codes[1:]]
        self._sums = torch.zeros(len(SIDES), 2, kv_heads, len(codes), dtype=torch.float64, device=device)

    def reset(self) -> None:
        """Forgets everything, for the next backward pass."""
        self._sums.zero_()

    def take_gradients(self, keys: CachedPart, values: CachedPart) -> None:
        """Adds what a backward pass says of the layer's keys and values."""
        for side, kept in enumerate((keys, values)):
            for part in range(0, kept.given.shape[2], TOKENS):
                moved = self._moved(*(tensor[0, :, part : part + TOKENS] for tensor in kept)).double()
                self._sums[side, 0] += moved.square().sum(1)
                self._sums[side, 1] += moved.sum(1)

    def _moved(self, given: Tensor, grad: Tensor) -> Tensor:
        """Returns `dK_j . dk_j` of every token, `[kv_heads, tokens, 1 + formats]`; arguments `[kv_heads, tokens, dim]`."""
        found = torch.linalg.vecdot(rounding_errors(given, self._kinds), rotate_quickly(grad))
        return torch.nn.functional.pad(found.movedim(0, -1), (1, 0))

    def tensors(self) -> dict[str, Tensor]:
        """Returns the sums by name, `[kv_heads, 1 + formats]` each."""
        return {
            f"{side}_{name}": self._sums[number, place]
            for number, side in enumerate(SIDES)
            for place, name in enumerate(("squares", "total"))
        }


def rounding_errors(x: Tensor, kinds: Sequence[int | KVFormat]) -> Tensor:
    """Returns `decode(encode(x)) - rotated(x)` of several formats: of ours ten times quicker, and not to the bit.

    The rotation is a matrix product, so a number half-way between two codes may get either of them. Vectors with a NaN or an
    infinity have errors that are not finite. `kinds` are the bits of a code, or formats of an installed package.

    Returns:
        float32, rotated, `[len(kinds), ..., dim]`, of `x` `[..., dim]`.
    """
    y = rotate_quickly(x)
    low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
    above = y.sub_(stored(low).float())
    found = torch.empty(len(kinds), *x.shape, device=x.device)
    for error, wanted in zip(found, kinds, strict=True):
        if isinstance(wanted, KVFormat):
            error.copy_(rotate_quickly(rounded_by(wanted, x) - x.float()))
            continue
        scale = stored((high - low) / ((1 << wanted) - 1)).float()
        inverse = torch.where(scale == 0, 0, 1 / scale)
        torch.mul(above, inverse, out=error).round_().clamp_(0, (1 << wanted) - 1).mul_(scale).sub_(above)
    return found


def rotate_quickly(x: Tensor) -> Tensor:
    """Returns `codes.rotated(x)` as a matrix product, which adds up in another order."""
    return x.float() @ _rotation(x.shape[-1], str(x.device))


@lru_cache(maxsize=8)
def _rotation(dim: int, device: str) -> Tensor:
    with torch.inference_mode(False):
        return rotated(torch.eye(dim, device=device))
