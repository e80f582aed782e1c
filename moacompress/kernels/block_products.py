"""Products with weights in blocks, in plain PyTorch: some outputs are dequantized at a time, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import linear

from moacompress.core.arrays import row_parts
from moacompress.core.errors import UnsupportedError
from moacompress.kernels.weight_blocks import WeightType, dequantized, weight_type
from moacompress.kernels.widened_products import is_widened

NUMBERS_AT_ONCE = 1 << 20
"""Of a weight that are dequantized at a time; 2 MiB in bfloat16 stay in a processor's cache until they are multiplied."""

_LIBRARY = torch.library.Library("moacompress_blocks", "DEF")
_LIBRARY.define("linear(Tensor x, Tensor blocks, int kind, Tensor? bias, bool compiled) -> Tensor")
_LIBRARY.define("linear_backward(Tensor grad, Tensor blocks, int kind, bool compiled) -> Tensor")


def block_linear(
    x: torch.Tensor, blocks: torch.Tensor, kind: WeightType, bias: torch.Tensor | None, compiled: bool = False
) -> torch.Tensor:
    """Returns `x @ weight.T + bias`, `[..., outputs]`, of blocks uint8 `[outputs, bytes]`, which are constants to gradients.

    `compiled` has the compiled kernels dequantize.

    Raises:
        UnsupportedError: the blocks have not as many inputs as `x`.
    """
    found: torch.Tensor = torch.ops.moacompress_blocks.linear(x, blocks, kind.code, bias, compiled)
    return found


def check_blocks(x: torch.Tensor, blocks: torch.Tensor, kind: WeightType) -> None:
    """Checks that a weight's blocks have the inputs that `x` has.

    Raises:
        UnsupportedError: they have not, or are no blocks.
    """
    if blocks.dtype != torch.uint8 or blocks.ndim != 2:
        raise UnsupportedError(
            f"blocks of a weight are uint8 [outputs, bytes], not {blocks.dtype} {list(blocks.shape)}"
        )
    if blocks.shape[1] != kind.row_bytes(x.shape[-1]):
        raise UnsupportedError(
            f"a {kind.name} weight of {x.shape[-1]} inputs has {kind.row_bytes(x.shape[-1])} bytes a row, not {blocks.shape[1]}"
        )


def _parts(
    blocks: torch.Tensor, kind: WeightType, dtype: torch.dtype, compiled: bool
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields outputs and their weights, `[some, inputs]`, which the next ones may be written over."""
    inputs = kind.inputs(blocks.shape[1])
    room = torch.empty(0, inputs, dtype=dtype)
    for outputs in row_parts(blocks.shape[0], inputs, NUMBERS_AT_ONCE):
        if compiled:
            room = room if len(room) else torch.empty(outputs.stop, inputs, dtype=dtype)
            weight = room[: outputs.stop - outputs.start]
            torch.ops.moacompress_cpu.expand_blocks(blocks[outputs], kind.code, weight)
            yield outputs, weight
        else:
            yield outputs, dequantized(blocks[outputs], kind, dtype)


def _linear(
    x: torch.Tensor, blocks: torch.Tensor, code: int, bias: torch.Tensor | None, compiled: bool
) -> torch.Tensor:
    kind = weight_type(code)
    check_blocks(x, blocks, kind)
    out = x.new_empty(*x.shape[:-1], blocks.shape[0])
    given = x.float() if is_widened(x) else x
    for outputs, weight in _parts(blocks, kind, given.dtype, compiled):
        out[..., outputs] = linear(given, weight, None if bias is None else bias[outputs].to(given.dtype))
    return out


def _linear_backward(grad: torch.Tensor, blocks: torch.Tensor, code: int, compiled: bool) -> torch.Tensor:
    kind = weight_type(code)
    wide = torch.promote_types(grad.dtype, torch.float32)
    found = grad.new_zeros(*grad.shape[:-1], kind.inputs(blocks.shape[1]), dtype=wide)
    given = grad.float() if is_widened(grad) else grad
    for outputs, weight in _parts(blocks, kind, given.dtype, compiled):
        found += given[..., outputs] @ weight
    return found.to(grad.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, blocks, ctx.code, _, ctx.compiled = inputs
    ctx.save_for_backward(blocks)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (blocks,) = ctx.saved_tensors
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = torch.ops.moacompress_blocks.linear_backward(grad, blocks, ctx.code, ctx.compiled)
    if ctx.needs_input_grad[3]:
        to_bias = grad.reshape(-1, blocks.shape[0]).sum(0)
    return to_x, None, None, to_bias, None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, blocks, ctx.code, ctx.compiled = inputs
    ctx.save_for_backward(blocks)


def _gradients_of_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (blocks,) = ctx.saved_tensors
    return torch.ops.moacompress_blocks.linear(grad, blocks, ctx.code, None, ctx.compiled), None, None, None


def _fake_linear(x: torch.Tensor, blocks: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], blocks.shape[0])


def _fake_backward(grad: torch.Tensor, blocks: torch.Tensor, code: int, *rest: Any) -> torch.Tensor:
    return grad.new_empty(*grad.shape[:-1], weight_type(code).inputs(blocks.shape[1]))


_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_backward", _linear_backward, "CompositeExplicitAutograd")
torch.library.register_fake("moacompress_blocks::linear", _fake_linear)
torch.library.register_fake("moacompress_blocks::linear_backward", _fake_backward)
torch.library.register_autograd("moacompress_blocks::linear", _gradients, setup_context=_setup)
torch.library.register_autograd(
    "moacompress_blocks::linear_backward", _gradients_of_backward, setup_context=_setup_backward
)
