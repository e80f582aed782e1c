"""Layers whose weights stay in blocks of codes and scales, see `moacompress.kernels.weight_blocks`.

Their parameter `weight` has the bytes as they lie, uint8 `[outputs, bytes]`: scales are inside, so `.to(dtype)`, `.half()` and
`dtype=` change what is computed in and never the weight, and a model without these layers fails on the shape. The type of the
blocks is the layer's. Weights in blocks are constants: gradients are for inputs, biases and whatever is added to the layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from moacompress.core.errors import ModelError, UnsupportedError
from moacompress.kernels.derivatives import is_transformed
from moacompress.kernels.dispatch import backend_for
from moacompress.kernels.weight_blocks import WEIGHT_TYPES, WeightType, dequantized

SCALED = "embed_scale"
"""The buffer of an embedding that scales its rows, as Gemma's does."""


def _weight(outputs: int, inputs: int, kind: WeightType, device: torch.device | str | None) -> nn.Parameter:
    blocks = torch.empty(outputs, kind.row_bytes(inputs), dtype=torch.uint8, device=device)
    return nn.Parameter(blocks, requires_grad=False)


class BlockLinear(nn.Linear):
    """A linear layer whose weight is in blocks, or for a while in numbers, see `with_dense_weight`.

    Raises:
        UnsupportedError: the inputs are no whole blocks.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kind: WeightType,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.kind: WeightType | None = kind
        self.weight = _weight(out_features, in_features, kind, device)
        made = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), False) if bias else None
        self.register_parameter("bias", made)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns `input @ weight.T + bias`, `[..., out_features]`, with gradients for input and bias."""
        return multiplied(input, self.weight, self.bias, self.kind)

    def extra_repr(self) -> str:
        """Returns sizes and type."""
        return super().extra_repr() if self.kind is None else f"{super().extra_repr()}, kind={self.kind.name}"


class BlockEmbedding(nn.Embedding):
    """An embedding whose weight is in blocks: looked-up rows are dequantized and multiplied by `scale`.

    They are returned in the dtype of the scale, which is on the CPU until the layer is moved.

    Raises:
        UnsupportedError: a row is no whole blocks.
    """

    embed_scale: torch.Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        kind: WeightType,
        *,
        padding_idx: int | None = None,
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.kind = num_embeddings, embedding_dim, kind
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.weight = _weight(num_embeddings, embedding_dim, kind, device)
        self.scalar_embed_scale = scale
        """As transformers names it, which fills the buffer from it."""
        self.register_buffer(SCALED, torch.tensor(scale, dtype=dtype, device="cpu"), persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns the rows of token ids, `[..., embedding_dim]`, in the dtype of the scale."""
        scale = self.embed_scale
        rows = dequantized(self.weight[input.reshape(-1)], self.kind, scale.dtype)
        return (rows * scale).view(*input.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """Returns sizes and type."""
        return f"{super().extra_repr()}, kind={self.kind.name}"


def multiplied(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kind: WeightType | None
) -> torch.Tensor:
    """Returns `x @ weight.T + bias`, `[..., outputs]`, of x `[..., inputs]`; autocast is as of torch's own.

    The weight is uint8 `[outputs, bytes]` in blocks of a kind, or `[outputs, inputs]` where that is None.
    """
    if kind is None:
        return nn.functional.linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if bias is None else bias.to(x.dtype)
    if is_transformed():
        return nn.functional.linear(x, dequantized(weight, kind, x.dtype), bias)
    return backend_for(x).linear_blocks(x, weight, kind, bias)


def kind_of(module: nn.Module) -> WeightType | None:
    """Returns the type of the blocks that a layer's weight is in, or None."""
    found = module.__dict__.get("kind")
    return found if isinstance(found, WeightType) else None


def weight_types(model: nn.Module) -> dict[str, str]:
    """Returns the names of layers whose weights are in blocks, with the names of the types; none of a dense model."""
    return {name: kind.name for name, kind in _kinds(model)}


def dense_weight(module: nn.Linear) -> torch.Tensor:
    """Returns the numbers of a linear layer's weight, `[outputs, inputs]`: its own, or float32 of one in blocks."""
    kind, weight = kind_of(module), module.weight.detach()
    return weight if kind is None else dequantized(weight, kind)


@contextmanager
def with_dense_weight(module: BlockLinear, weight: torch.Tensor) -> Iterator[None]:
    """Replaces a layer's blocks by numbers, `[outputs, inputs]`, for the length of a `with`; it is saved with them too."""
    before, kind = module.weight, module.kind
    try:
        module.weight, module.kind = nn.Parameter(weight, requires_grad=False), None
        yield
    finally:
        module.weight, module.kind = before, kind


def _refuse_merging(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Has adapters that PEFT puts around a layer in blocks refuse to be merged into it, where they would fail on the shape.

    PEFT asks nobody whether a layer can be merged into; torch tells of every module that becomes a part of another.
    """
    if name == "base_layer" and isinstance(submodule, BlockLinear) and callable(getattr(type(module), "merge", None)):
        module.__dict__["merge"] = partial(_merge, module)


def _merge(adapter: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the method `merge` of an adapter.

    Raises:
        UnsupportedError: the layer's weight is in blocks.
    """
    kind = kind_of(adapter.base_layer)
    if kind is None:
        return type(adapter).merge(adapter, *args, **kwargs)
    raise UnsupportedError(
        f"an adapter cannot be merged into a weight in {kind.name} blocks: the sum would be rounded again, and what that loses "
        "is not measured. Leave the adapter beside the weights; or load or export the model with weights='dense' (--weights "
        "dense) and merge there; or train with `moacompress heal`, which stores the layers that it trains as numbers"
    )


register_module_module_registration_hook(_refuse_merging)


def check_no_blocks(module: nn.Module, what: str) -> None:
    """Refuses what cannot be done to weights in blocks, where torch would speak of bytes; `what` ends the sentence.

    Raises:
        UnsupportedError: a weight in it is in blocks.
    """
    found = _kinds(module)
    if found:
        name, kind = found[0]
        raise UnsupportedError(
            f"{len(found)} weights are in blocks, such as {name or 'this one'} in {kind.name}, and cannot {what}: they are "
            "constants. Load or export the model with weights='dense' (--weights dense), or leave these and train adapters "
            "beside them"
        )


def put_numbers(module: BlockLinear, weight: torch.Tensor) -> None:
    """Makes a layer in blocks a plain linear layer with these numbers, `[outputs, inputs]`, for good."""
    module.weight = nn.Parameter(weight, requires_grad=False)
    del module.kind
    module.__class__ = nn.Linear  # type: ignore[assignment]


def settle_scales(model: nn.Module) -> None:
    """Gives embeddings in blocks their scales, in the model's dtype and beside their weights, once these are loaded."""
    for module in model.modules():
        if isinstance(module, BlockEmbedding):
            like = module.embed_scale
            module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=like.dtype, device=module.weight.device)


def block_weights(model: nn.Module) -> dict[str, WeightType]:
    """Returns the types of the weights that are in blocks, by the names that `state_dict` has for them."""
    return {f"{name}.weight" if name else "weight": kind for name, kind in _kinds(model)}


def _kinds(model: nn.Module) -> list[tuple[str, WeightType]]:
    return [(name, kind) for name, module in model.named_modules() if (kind := kind_of(module)) is not None]


def can_hold_blocks(module: nn.Module | None, kind: WeightType) -> str | None:
    """Returns why a layer's weight cannot be in such blocks, as the end of a sentence; None where it can."""
    if type(module) is nn.Linear:
        inputs = module.in_features
    elif isinstance(module, nn.Embedding) and module.max_norm is None:
        plain = type(module) is nn.Embedding or isinstance(getattr(module, "scalar_embed_scale", None), float | int)
        if not plain:
            return f"{type(module).__name__} is an embedding that is not known"
        inputs = module.embedding_dim
    else:
        return f"{type(module).__name__} is no plain linear layer or embedding"
    if inputs % kind.numbers:
        return f"its rows of {inputs} numbers are no whole {kind.name} blocks of {kind.numbers}"
    return None


def put_block_layer(model: nn.Module, name: str, kind: WeightType, blocks: torch.Tensor | None = None) -> None:
    """Puts a layer for blocks in the place of a dense one, by its name; a linear layer's bias stays.

    The blocks are uint8 `[outputs, bytes]`; without them the weight is left to be filled, where the layer's own is.

    Raises:
        UnsupportedError: there are no such blocks of this layer.
    """
    old, like = model.get_submodule(name), model.get_parameter(f"{name}.weight")
    place = "meta" if blocks is not None else like.device
    made: BlockLinear | BlockEmbedding
    if isinstance(old, nn.Linear):
        made = BlockLinear(old.in_features, old.out_features, kind, device=place)
        made.register_parameter("bias", old.bias)
    elif isinstance(old, nn.Embedding):
        made = BlockEmbedding(
            old.num_embeddings,
            old.embedding_dim,
            kind,
            padding_idx=old.padding_idx,
            scale=float(getattr(old, "scalar_embed_scale", 1.0)),
            dtype=like.dtype,
            device=place,
        )
    else:
        raise UnsupportedError(f"{name} is a {type(old).__name__}, whose weight cannot be in blocks")
    if blocks is not None:
        if blocks.dtype != torch.uint8 or blocks.shape != made.weight.shape:
            raise UnsupportedError(
                f"the blocks of {name} are uint8 {list(made.weight.shape)}, not {blocks.dtype} {list(blocks.shape)}"
            )
        made.weight = nn.Parameter(blocks, requires_grad=False)
    made.train(old.training)
    model.set_submodule(name, made)


def put_block_layers(model: nn.Module, types: Mapping[str, str]) -> None:
    """Puts layers for blocks in the place of dense ones, by their names, with the names of the types.

    Names and types may come from a file that is not trusted.

    Raises:
        ModelError: the model has no such layer, or none that can hold such blocks.
    """
    modules = dict(model.named_modules())
    for name, type_name in types.items():
        if name not in modules or type_name not in WEIGHT_TYPES:
            what = f"layer {name[:80]!r}" if name not in modules else f"type of weights {type_name[:40]!r}"
            raise ModelError(
                f"the {what} is not known; types are {', '.join(WEIGHT_TYPES)}, and layers the model's own"
            )
        problem = can_hold_blocks(modules[name], WEIGHT_TYPES[type_name])
        if problem is not None:
            raise ModelError(f"the weight of {name[:80]} cannot be in {type_name} blocks: {problem}")
    for name, type_name in types.items():
        put_block_layer(model, name, WEIGHT_TYPES[type_name])
