"""Products with weights: what is left of a step on a CPU once attention is cheap.

A few rows, as of a decode step, are multiplied by the compiled kernels, which read a weight as it lies and are quicker to call
than torch. More rows go through torch, which hands products in float32 to MKL; on AMD's processors that leaves much of the
machine unused, so there they go to oneDNN, which torch brings too and which reads the same weight. No weight is held twice.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from moacompress.core.machine import processor_name
from moacompress.kernels.backend import FEW_ROWS
from moacompress.kernels.dispatch import backend_for, capabilities_for, few_rows
from moacompress.kernels.weight_blocks import WeightType

ON_AMD = "AMD" in processor_name() and torch.backends.mkldnn.is_available()
"""Whether products of many rows in float32 are oneDNN's: on AMD's processors, where this torch brings it."""
_LINEAR = nn.Linear.forward

_LIBRARY = torch.library.Library("moacompress", "FRAGMENT")
_LIBRARY.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def onednn_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns `x @ weight.T + bias`, `[..., outputs]`, by oneDNN, without gradients.

    Args:
        x: float32 `[..., inputs]`.
        weight: float32 `[outputs, inputs]`, strided in any way.
        bias: `[outputs]`, or None.
    """
    product = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return cast(torch.Tensor, product)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    (weight,) = ctx.saved_tensors
    return torch.ops.moacompress.onednn_linear(grad, weight.t(), None), None, None


_LIBRARY.impl("onednn_linear", onednn_product, "CPU")
torch.library.register_fake(
    "moacompress::onednn_linear", lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0])
)
torch.library.register_autograd("moacompress::onednn_linear", _gradients, setup_context=_setup)


class KernelLinear(nn.Linear):
    """A linear layer whose products go to what is quickest here; where its weight is trained, they are torch's own."""

    IS_PLAIN = True
    """As `models.block_layers.can_hold_blocks` asks: it computes what `torch.nn.Linear` does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns `input @ weight.T + bias`, `[..., out_features]`."""
        own = self._parameters
        weight, bias = own.get("weight"), own.get("bias")
        if weight is None or "bias" not in own or nn.Linear.forward is not _LINEAR:
            return super().forward(input)  # pruned, a parametrization in its place, or somebody else's kernels
        trained = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
        if trained or not lies_ready(weight, input) or not (bias is None or lies_ready(bias, input)):
            return nn.functional.linear(input, weight, bias)
        if has_few_rows(input) and capabilities_for(input).linear:
            return backend_for(input).linear(input, weight, bias)
        if input.dtype != torch.float32 or input.device.type != "cpu" or not input.numel() or not ON_AMD:
            return nn.functional.linear(input, weight, bias)
        if torch.is_autocast_enabled("cpu"):
            return nn.functional.linear(input, weight, bias)
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            return onednn_product(input, weight, bias)  # an operator takes as long again as a small product
        return cast(torch.Tensor, torch.ops.moacompress.onednn_linear(input, weight, bias))


def use_kernels(*models: nn.Module) -> int:
    """Has the plain linear layers of models on the CPU multiply by what is quickest, see `KernelLinear`; no weight is copied.

    Subclasses of `torch.nn.Linear` may compute something else, and stay.

    Returns:
        How many layers changed.
    """
    layers = [layer for model in models for layer in model.modules() if type(layer) is nn.Linear]
    return sum(take(layer) for layer in layers if layer.weight.device.type == "cpu")


def take(layer: nn.Module) -> bool:
    """As `use_kernels`, for one layer on any device.

    Returns:
        Whether it was a plain one: `leave` undoes it.
    """
    if type(layer) is not nn.Linear:
        return False
    layer.__class__ = KernelLinear
    return True


def leave(layer: nn.Module) -> None:
    """Gives a linear layer back to torch."""
    if type(layer) is KernelLinear:
        layer.__class__ = nn.Linear  # type: ignore[assignment]


def has_few_rows(x: torch.Tensor) -> bool:
    """Returns whether an input, `[..., in_features]`, has few enough rows for the compiled kernels, and no gradients."""
    if x.requires_grad and torch.is_grad_enabled():
        return False
    return x.numel() <= FEW_ROWS * x.shape[-1] or x.numel() <= few_rows(x) * x.shape[-1]


def lies_ready(tensor: object, x: torch.Tensor, kind: WeightType | None = None) -> bool:
    """Returns whether compiled kernels, where there are some for an input `x`, can read a parameter as it lies.

    It must be a tensor that is what it says (quantizers and parallelism have others in its place), contiguous, of the input's
    dtype and device, and not trained here. One in blocks is of bytes.
    """
    return (
        isinstance(tensor, torch.Tensor)
        and type(tensor) in (nn.Parameter, torch.Tensor)
        and tensor.dtype == (x.dtype if kind is None else torch.uint8)
        and tensor.device == x.device
        and tensor.is_contiguous()
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )
