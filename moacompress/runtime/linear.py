"""Products with weights: what is left of a step on a CPU once attention is cheap.

torch hands products in float32 to MKL, which packs a weight again for every product and, on AMD's processors, leaves much of
the machine unused. oneDNN, which torch brings too, takes a weight that is packed once. A packed weight is a second copy: the
model keeps its own for everything else (embeddings tied to it, checkpoints). A few rows, as of a decode step, are multiplied
by the compiled kernels instead, which read the model's own weight as it lies and are quicker to call.

A copy can be stale, and not every write to a tensor shows: those through `.data` and of optimizers' fused kernels change no
version. So only weights that nobody trains are packed, and the pack is dropped as soon as somebody might write: by whatever
trains, moves, replaces or loads the weight, and by taking it in hand (`layer.weight`), as everything that merges adapters does.
"""

from __future__ import annotations

import itertools
import logging
import platform
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from moacompress.core.memory import available_bytes
from moacompress.kernels.backend import FEW_ROWS
from moacompress.kernels.dispatch import backend_for, capabilities_for, few_rows
from moacompress.kernels.weight_blocks import WeightType

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16)
ROWS = 64
"""Rows that a weight is packed for; 1 and 8 were nowhere faster by more than 5%, from 1 to 256 rows."""
SPARE = 3
"""How many times the packed bytes must be free: they themselves, once more for gradients, and what the model runs in."""

_LINEAR = nn.Linear.forward
_numbers = itertools.count(1)
_packs: weakref.WeakValueDictionary[int, _Pack] = weakref.WeakValueDictionary()

_LIBRARY = torch.library.Library("moacompress", "FRAGMENT")
_LIBRARY.define("packed_linear(Tensor x, Tensor weight, Tensor? bias, int number) -> Tensor")
_LIBRARY.define("packed_linear_backward(Tensor grad, Tensor weight, int number) -> Tensor")


class _Pack:
    """The packed form of a weight, and that of its transpose once a gradient asks for it.

    A graph holds its number: tensors in oneDNN's own layout cannot be traced. Layers that share a weight share it.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.number = next(_numbers)
        self._weight = weakref.ref(weight)
        self._state = _state(weight)
        self._packed: torch.Tensor | None = _reordered(weight)
        self._transposed: torch.Tensor | None = None
        _packs[self.number] = self

    @property
    def dropped(self) -> bool:
        """Whether it is of no use any more."""
        return self._packed is None

    def drop(self) -> None:
        """Frees it, for all layers that share it."""
        self._packed = self._transposed = None

    def is_of(self, weight: torch.Tensor | None) -> bool:
        """Whether it was made of this very parameter, which is frozen and shows no change; it is dropped otherwise."""
        if self._packed is None:
            return False
        if weight is not None and self._weight() is weight and self.holds(weight):
            return True
        self.drop()
        return False

    def holds(self, weight: torch.Tensor) -> bool:
        """Whether the parameter is still there, this tensor is its memory, and nothing shows that it was written."""
        own = self._weight()
        if self._packed is None or own is None or own.requires_grad or own.grad is not None:
            return False
        return self._state == _state(own) == _state(weight)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Returns `x @ weight.T + bias`."""
        assert self._packed is not None
        return _product(x, self._packed, bias)

    def gradient(self, grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Returns `grad @ weight`."""
        if self._transposed is None:
            self._transposed = _reordered(weight.t())
        return _product(grad, self._transposed, None)


def _state(weight: torch.Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight._version, weight.dtype, weight.shape, weight.stride()


def _reordered(weight: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS))


def _product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product = torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")
    return cast(torch.Tensor, product)


def _valid(number: int, weight: torch.Tensor, x: torch.Tensor) -> _Pack | None:
    pack = _packs.get(number)
    return pack if pack is not None and x.numel() and pack.holds(weight) else None


def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, number: int) -> torch.Tensor:
    pack = _valid(number, weight, x)
    return nn.functional.linear(x, weight, bias) if pack is None else pack.product(x, bias)


def _backward(grad: torch.Tensor, weight: torch.Tensor, number: int) -> torch.Tensor:
    pack = _valid(number, weight, grad)
    return grad @ weight if pack is None else pack.gradient(grad, weight)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, weight, _, ctx.number = inputs
    ctx.save_for_backward(weight)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    (weight,) = ctx.saved_tensors
    return torch.ops.moacompress.packed_linear_backward(grad, weight, ctx.number), None, None, None


_LIBRARY.impl("packed_linear", _forward, "CPU")
_LIBRARY.impl("packed_linear_backward", _backward, "CPU")
torch.library.register_fake(
    "moacompress::packed_linear", lambda x, weight, bias, number: x.new_empty(*x.shape[:-1], weight.shape[0])
)
torch.library.register_fake(
    "moacompress::packed_linear_backward",
    lambda grad, weight, number: grad.new_empty(*grad.shape[:-1], weight.shape[1]),
)
torch.library.register_autograd("moacompress::packed_linear", _gradients, setup_context=_setup)


class PackedLinear(nn.Linear):
    """A linear layer of which the compiled kernels multiply a few rows, and whose weight may be packed; see `pack_weights`.

    Without a pack it reads its weight as it lies. Copies of it have nothing packed.
    """

    _pack: _Pack | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns `input @ weight.T + bias`, `[..., out_features]`; with gradients of the weight it is torch's own."""
        own = self._parameters
        weight, bias = own.get("weight"), own.get("bias")
        if weight is None or "bias" not in own:  # pruned, or a parametrization in its place
            self.drop_pack()
            return super().forward(input)
        if nn.Linear.forward is not _LINEAR:  # somebody else's kernels
            return super().forward(input)
        pack = self._usable(weight)
        trained = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
        if trained or input.dtype != weight.dtype:
            return nn.functional.linear(input, weight, bias)
        ready = has_few_rows(input) and lies_ready(weight, input) and (bias is None or lies_ready(bias, input))
        if ready and capabilities_for(input).linear:
            return backend_for(input).linear(input, weight, bias)
        if pack is None or input.device.type != "cpu":  # weights are packed for the CPU
            return nn.functional.linear(input, weight, bias)
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            return _forward(input, weight, bias, pack.number)  # an operator takes as long again as a small product
        return cast(torch.Tensor, torch.ops.moacompress.packed_linear(input, weight, bias, pack.number))

    def _usable(self, weight: torch.Tensor) -> _Pack | None:
        """Returns the pack where the weight is still what was packed; else drops it. A graph's operator asks by itself."""
        pack = self._pack
        if pack is None or torch.compiler.is_compiling():
            return None if self.training or weight.requires_grad else pack
        if self.training or not pack.is_of(weight):
            self.drop_pack()
            return None
        return pack

    def drop_pack(self) -> None:
        """Has the weight read as it lies from now on, here and in all layers that share it."""
        pack = self.__dict__.pop("_pack", None)
        if pack is not None:
            pack.drop()

    def train(self, mode: bool = True) -> PackedLinear:
        """Sets the mode as torch does; what is to be trained is not packed."""
        if mode:
            self.drop_pack()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> PackedLinear:
        self.drop_pack()
        return cast(PackedLinear, super()._apply(*args, **kwargs))  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        # whoever takes the weight may write to it: what merges adapters continues to `.data`, which nothing tells afterwards
        if name == "weight" and not torch.compiler.is_compiling():
            self.drop_pack()
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("_pack", None)
        return state


def weight_of(layer: nn.Linear) -> torch.Tensor:
    """Returns a layer's weight to somebody who only reads it: taken as `layer.weight` it would be unpacked."""
    own = layer._parameters.get("weight")
    return layer.weight if own is None else own


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


def can_pack() -> bool:
    """Returns whether this torch and this machine have what packed weights need."""
    return (
        platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def pack_weights(*models: nn.Module) -> int:
    """Packs the frozen weights of all linear layers on the CPU, so that their products are faster.

    It takes as much memory again as these weights; a few rows, see `dispatch.few_rows`, are multiplied without it, by the
    compiled kernels.
    Parameters and checkpoints are as before. Models that share weights share the packed ones.

    The pack of a weight is dropped, and the weight read as it lies again, by `train()`, `requires_grad`, a gradient, another
    parameter or other memory in its place, `.to(...)`, `load_state_dict`, a write that torch counts, and whoever takes it as
    `layer.weight`: merging adapters does. What cannot be seen is a write through `.data` of a parameter that was taken
    otherwise (from `parameters()` or `state_dict()`) or before it was packed: call `unpack_weights` after one.

    Args:
        models: in float32 or bfloat16, in evaluation mode (`eval()`) and with frozen weights (`requires_grad_(False)`); what is
            trained, on another device or of another dtype is left alone.

    Returns:
        Bytes that the packed weights take; 0 where there is nothing to pack, or this machine cannot.
    """
    if not can_pack():
        return 0
    unpack_weights(*models)
    weights = _weights(*models)
    trained = sum(
        1 for model in models for layer in _packable(model) if weight_of(layer).requires_grad or layer.training
    )
    if trained:
        logger.warning(
            "%d linear layers are not packed: they are trained, or may be; call model.eval().requires_grad_(False) first",
            trained,
        )
    packs = {key: _Pack(weight) for key, weight in weights.items()}
    for model in models:
        for layer in _layers(model):
            layer.__class__ = PackedLinear
            cast(PackedLinear, layer)._pack = packs[id(weight_of(layer))]
    return sum(weight.nbytes for weight in weights.values())


def unpack_weights(*models: nn.Module) -> None:
    """Drops all packed weights of models, and with them those of the models that share them: weights are read as they lie.

    To be called after a write that `pack_weights` cannot see.
    """
    for model in models:
        for layer in model.modules():
            if isinstance(layer, PackedLinear):
                layer.drop_pack()


def take_few_rows(layer: nn.Module) -> bool:
    """Has the compiled kernels multiply a few rows of a plain linear layer; packs nothing.

    Returns:
        Whether it was one: `leave_few_rows` undoes it.
    """
    if type(layer) is not nn.Linear:
        return False
    layer.__class__ = PackedLinear
    return True


def leave_few_rows(layer: nn.Module) -> None:
    """Gives a linear layer back to torch, unless its weight has been packed meanwhile."""
    if type(layer) is PackedLinear and (layer._pack is None or layer._pack.dropped):
        layer.__class__ = nn.Linear  # type: ignore[assignment]


def pack_where_it_fits(model: nn.Module, free: Callable[[], int] = available_bytes) -> int:
    """As `pack_weights`, if there is memory for it; otherwise the model stays as it is."""
    wanted = SPARE * sum(weight.nbytes for weight in _weights(model).values())
    available = free()
    if available < wanted:
        logger.info("weights are not packed: that wants %d MiB, and %d MiB are free", wanted >> 20, available >> 20)
        return 0
    return pack_weights(model)


def packed_bytes(model: nn.Module) -> int:
    """Returns the bytes of a model's packed weights; their transposes, for gradients, take as much again."""
    packs = {
        layer._pack.number: weight_of(layer).nbytes
        for layer in model.modules()
        if isinstance(layer, PackedLinear) and layer._pack and not layer._pack.dropped
    }
    return sum(packs.values())


def _weights(*models: nn.Module) -> dict[int, torch.Tensor]:
    """Returns the weights that are packed by their `id`, so that shared ones come once."""
    return {id(weight_of(layer)): weight_of(layer) for model in models for layer in _layers(model)}


def _layers(model: nn.Module) -> list[nn.Linear]:
    """Returns the layers whose weights are packed: those that nobody trains."""
    return [layer for layer in _packable(model) if not (weight_of(layer).requires_grad or layer.training)]


def _packable(model: nn.Module) -> list[nn.Linear]:
    """Returns the layers whose weights could be packed; subclasses may compute something else."""
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
        and type(layer) in (nn.Linear, PackedLinear)
        and weight_of(layer).device.type == "cpu"
        and weight_of(layer).dtype in DTYPES
        and not weight_of(layer).is_inference()
    ]
