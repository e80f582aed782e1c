"""Products with weights: what is left of a step on a CPU once attention is cheap, and most of what a prompt takes.

A few rows, as of a decode step, are multiplied by the compiled kernels, which read a weight as it lies and are quicker to call
than torch. More rows go through torch, with two exceptions. torch hands products in float32 to MKL, which makes no use of
AVX-512 on AMD's processors; where they have it, products go to oneDNN, which torch brings too and which reads the same weight.
And 16-bit numbers are multiplied in float32 where a processor has no instructions for them, see `kernels.widened_products`. No
weight is held twice.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from moacompress.core.machine import processor_name
from moacompress.kernels.backend import FEW_ROWS
from moacompress.kernels.derivatives import is_transformed
from moacompress.kernels.dispatch import backend_for, capabilities_for, few_rows
from moacompress.kernels.weight_blocks import WeightType
from moacompress.kernels.widened_products import is_widened, widened_linear

ON_AMD = (
    "AMD" in processor_name()
    and torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
)
"""Whether products of many rows in float32 are oneDNN's: on AMD's processors with AVX-512, where this torch brings it."""
_LINEAR, _STRIDED = nn.Linear.forward, torch.strided

_LIBRARY = torch.library.Library("moacompress", "FRAGMENT")
_LIBRARY.define("float32_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def onednn_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns `x @ weight.T + bias`, `[..., outputs]`, by oneDNN, without gradients.

    `x`: float32 `[..., inputs]`. `weight`: float32 `[outputs, inputs]`, strided in any way. `bias`: `[outputs]`, or None.
    """
    product = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return cast(torch.Tensor, product)


def float32_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns `x @ weight.T + bias`, `[..., outputs]`, in the dtype of `x`: multiplied in float32, without gradients.

    `x`: float32, bfloat16 or float16, `[..., inputs]`. `weight`: `[outputs, inputs]`, strided in any way. `bias`: `[outputs]`,
    or None.
    """
    product = onednn_product if ON_AMD else nn.functional.linear
    return product(x, weight, bias) if x.dtype == torch.float32 else widened_linear(x, weight, bias, product)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    (weight,) = ctx.saved_tensors
    return torch.ops.moacompress.float32_linear(grad, weight.t(), None), None, None


_LIBRARY.impl("float32_linear", float32_product, "CPU")
torch.library.register_fake(
    "moacompress::float32_linear", lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0])
)
torch.library.register_autograd("moacompress::float32_linear", _gradients, setup_context=_setup)


class KernelLinear(nn.Linear):
    """A linear layer whose products go to what is quickest here; where its weight is trained, they are torch's own."""

    stays: bool = False
    """Whether it was asked for by itself, and is not only part of a plan: `uninstall_kernel` does nothing then."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns `input @ weight.T + bias`, `[..., out_features]`."""
        own = self._parameters
        weight, bias = own.get("weight"), own.get("bias")
        if weight is None or "bias" not in own or nn.Linear.forward is not _LINEAR:
            return super().forward(input)  # pruned, a parametrization in its place, or somebody else's kernels
        return quickest_linear(input, weight, bias)


def quickest_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns `x @ weight.T + bias`, `[..., outputs]`, by what is quickest here; by torch where the weight is trained.

    `x`: `[..., inputs]`. `weight`: `[outputs, inputs]`. `bias`: `[outputs]`, or None.
    """
    trained = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    ready = is_kernel_compatible(weight, x) and (bias is None or is_kernel_compatible(bias, x))
    odd = x.layout is not _STRIDED or x.is_nested  # sparse, or nested
    if odd or trained or not ready or torch.is_autocast_enabled(x.device.type):
        return nn.functional.linear(x, weight, bias)
    if has_few_rows(x) and capabilities_for(x).linear:
        return backend_for(x).linear(x, weight, bias)
    ours = is_widened(x) or (ON_AMD and x.dtype == torch.float32 and x.device.type == "cpu")
    if not ours or not x.numel() or is_transformed():
        return nn.functional.linear(x, weight, bias)
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        return float32_product(x, weight, bias)  # an operator takes as long again as a small product
    return cast(torch.Tensor, torch.ops.moacompress.float32_linear(x, weight, bias))


def use_kernels(*models: nn.Module) -> int:
    """Has the plain linear layers of models on the CPU multiply by what is quickest, see `KernelLinear`; no weight is copied.

    Subclasses of `torch.nn.Linear` may compute something else, and stay.

    Returns:
        How many layers changed.
    """
    layers = [layer for model in models for layer in model.modules() if type(layer) in (nn.Linear, KernelLinear)]
    changed = 0
    for layer in layers:
        if layer.weight.device.type == "cpu":
            changed += install_kernel(layer)
            cast(KernelLinear, layer).stays = True
    return changed


def install_kernel(layer: nn.Module) -> bool:
    """As `use_kernels`, for one layer on any device.

    Returns:
        Whether it was a plain one: `uninstall_kernel` undoes it.
    """
    if type(layer) is not nn.Linear:
        return False
    layer.__class__ = KernelLinear
    return True


def uninstall_kernel(layer: nn.Module) -> None:
    """Gives a linear layer back to torch, unless `use_kernels` took it too."""
    if type(layer) is KernelLinear and not layer.stays:
        layer.__class__ = nn.Linear  # type: ignore[assignment]


def has_few_rows(x: torch.Tensor) -> bool:
    """Returns whether an input, `[..., in_features]`, has few enough rows for the compiled kernels, and no gradients."""
    if (x.requires_grad and torch.is_grad_enabled()) or is_transformed():
        return False
    return x.numel() <= FEW_ROWS * x.shape[-1] or x.numel() <= few_rows(x) * x.shape[-1]


def is_kernel_compatible(tensor: object, x: torch.Tensor, kind: WeightType | None = None) -> bool:
    """Returns whether compiled kernels, where there are some for an input `x`, can read a parameter as it lies.

    It must be a tensor that is what it says (quantizers and parallelism have others in its place), contiguous, of the input's
    dtype and device, and not trained here. One in blocks is of bytes. It may not be sparse.
    """
    return (
        isinstance(tensor, torch.Tensor)
        and type(tensor) in (nn.Parameter, torch.Tensor)
        and tensor.layout is _STRIDED
        and tensor.dtype == (x.dtype if kind is None else torch.uint8)
        and tensor.device == x.device
        and tensor.is_contiguous()
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )
