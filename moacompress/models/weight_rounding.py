"""Float weights rounded to blocks of integer codes: `int8` are Q8_0, `int4` are Q4_1, 32 numbers a block.

Both round to nearest with the scale that is stored. Of a block of `int4` the range may be narrower than its numbers, whichever
of `SHARES` leaves the least squared error. On normal numbers the relative squared error of Q4_1 is then 0.0058, at 5 bits a
number, and that of the symmetric Q4_0 0.0069, at 4.5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moacompress.core.arrays import row_parts
from moacompress.core.errors import ModelError
from moacompress.kernels.weight_blocks import WEIGHT_TYPES, WeightType
from moacompress.models.block_layers import can_hold_blocks, put_block_layer, weight_types

ROUNDED = {"int8": "Q8_0", "int4": "Q4_1"}
"""Types of blocks that weights are rounded to, by what a recipe calls them."""
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Of a block's range that codes span; what is outside is clipped."""
NUMBERS_AT_ONCE = 1 << 22
"""Of a weight that are rounded at a time."""
_LARGEST = torch.finfo(torch.float16).max


def rounded(weight: torch.Tensor, kind: WeightType) -> torch.Tensor:
    """Returns the blocks nearest to a float weight `[outputs, inputs]`, inputs in whole blocks: uint8 `[outputs, bytes]`.

    Raises:
        ModelError: a number is not finite, or too large for a scale in float16.
    """
    inputs = weight.shape[1]
    out = torch.empty(len(weight), kind.row_bytes(inputs), dtype=torch.uint8, device=weight.device)
    for rows in row_parts(len(weight), inputs, NUMBERS_AT_ONCE):
        part = weight[rows].float().unflatten(1, (inputs // kind.numbers, kind.numbers))
        if not part.isfinite().all() or float(part.abs().max()) > _LARGEST:
            raise ModelError("a weight is not finite, or too large for blocks; keep the weights dense")
        out[rows] = _BLOCKS[kind.name](part).flatten(1)
    return out


def round_weights(model: Any, weights: str | None, head: str | None = None) -> None:
    """Rounds the weights of a dense model's linear layers to `int8` or `int4`, in place; None leaves them.

    `head` is of the embedding and the output layer; where these are one tensor they stay one. Layers whose rows are no whole
    blocks, and those that are not plain linear layers, stay as they are.
    """
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {id(module): name for name, module in model.named_modules()}
    made: dict[int, torch.Tensor] = {}
    for module in [*model.modules()]:
        asked = head if any(module is end for end in ends) else weights if type(module) is nn.Linear else None
        if asked is None:
            continue
        kind = WEIGHT_TYPES[ROUNDED[asked]]
        if can_hold_blocks(module, kind) is not None:
            continue
        key = id(module.weight)
        if key not in made:
            made[key] = rounded(module.weight.detach(), kind)
        put_block_layer(model, names[id(module)], kind, made[key])
    model.tie_weights()


def round_like(model: Any, exact: Any) -> None:
    """Gives a dense model, in any dtype, the blocks of `exact`, whose numbers were rounded before they lost bits, in place."""
    for name, kind in weight_types(exact).items():
        put_block_layer(model, name, WEIGHT_TYPES[kind], exact.get_parameter(f"{name}.weight").detach())
    model.tie_weights()


def _codes(numbers: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    inverse = torch.where(scale == 0, 0, 1 / scale)
    return (numbers * inverse).round().clamp(low, high)


def _q8_0(numbers: torch.Tensor) -> torch.Tensor:
    scale = (numbers.abs().amax(-1, keepdim=True) / 127).half()
    codes = _codes(numbers, scale.float(), -127, 127).to(torch.int8)
    return torch.cat((scale.view(torch.uint8), codes.view(torch.uint8)), -1)


def _q4_1(numbers: torch.Tensor) -> torch.Tensor:
    low, high = numbers.amin(-1, keepdim=True), numbers.amax(-1, keepdim=True)
    best: tuple[torch.Tensor, ...] = ()
    for share in SHARES:
        inset = (1 - share) / 2 * (high - low)
        zero = (low + inset).half().float()
        scale = ((high - inset - zero) / 15).half().float()
        codes = _codes(numbers - zero, scale, 0, 15)
        error = (codes * scale + zero - numbers).square().sum(-1, keepdim=True)
        found: tuple[torch.Tensor, ...] = (error, scale, zero, codes)
        if best:
            less = error < best[0]
            found = tuple(torch.where(less, new, old) for new, old in zip(found, best, strict=True))
        best = found
    _, scale, zero, codes = best
    low_codes, high_codes = codes.to(torch.uint8).chunk(2, -1)  # of 32 codes the first half are the low four bits
    packed = low_codes | high_codes << 4
    return torch.cat((scale.half().view(torch.uint8), zero.half().view(torch.uint8), packed), -1)


_BLOCKS = {"Q8_0": _q8_0, "Q4_1": _q4_1}
