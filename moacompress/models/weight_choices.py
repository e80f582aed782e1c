"""What the weights of a model take in a checkpoint, and what they would take with linear layers rounded one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from moacompress.core.arrays import Ints
from moacompress.kernels.weight_blocks import WEIGHT_TYPES
from moacompress.models.block_layers import can_hold_blocks
from moacompress.models.placement import tensors_once
from moacompress.models.weight_rounding import ROUNDED
from moacompress.rules.formats import DTYPE_BYTES, NATIVE

CHOICES = (NATIVE, "int8", "int4")
"""What the weight of a linear layer may be."""
HEADER_BYTES = 160
"""Most bytes that the header of a safetensors file takes for a tensor, beside its name, and for the file itself."""


def checkpoint_bytes(model: nn.Module, dtype: str) -> int:
    """Returns the most bytes that a checkpoint's weight files take, their headers counted; a shared weight counts once.

    Args:
        model: as it would be saved; blocks stay as they are.
        dtype: that its floats are saved in, where they are in the model's own now.
    """
    own, total = getattr(model, "dtype", None), HEADER_BYTES
    for name, tensor in tensors_once(model):
        total += _stored(tensor, own, dtype) + len(name.encode()) + HEADER_BYTES
    return total


def _stored(tensor: torch.Tensor, own: torch.dtype | None, dtype: str) -> int:
    return tensor.numel() * DTYPE_BYTES[dtype] if tensor.dtype == own else tensor.nbytes


@dataclass(frozen=True, eq=False)
class WeightChoices:
    """What every linear layer's weight may be.

    Attributes:
        names: of the layers that can be rounded, in the model's order.
        sizes: bytes of each one's weight as each of `CHOICES`, int64 `[layers, choices]`.
        fixed: bytes of all else in the checkpoint's files.
        ends: embedding and output layer, where they are rounded whatever is chosen: their names, with the formats.
    """

    names: tuple[str, ...]
    sizes: Ints
    fixed: int
    ends: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(model: Any, dtype: str, head: str | None = None) -> WeightChoices:
        """Returns the choices of a dense model.

        Args:
            model: a causal language model.
            dtype: of the checkpoint.
            head: `int8` or `int4` for embedding and output layer, or None.
        """
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        used: dict[int, int] = {}
        for _, parameter in model.named_parameters(remove_duplicate=False):
            used[id(parameter)] = used.get(id(parameter), 0) + 1
        names, sizes, fixed = [], [], checkpoint_bytes(model, dtype)
        rounded_ends: dict[str, str] = {}
        saved: dict[int, int] = {}
        for name, module in model.named_modules():
            if any(module is end for end in ends):
                if head is not None and can_hold_blocks(module, WEIGHT_TYPES[ROUNDED[head]]) is None:
                    rounded_ends[name] = head
                    native, *rounded = _sizes(module.weight, model.dtype, dtype)
                    saved[id(module.weight)] = native - rounded[CHOICES[1:].index(head)]
            elif isinstance(module, nn.Linear) and used[id(module.weight)] == 1 and _can_choose(module):
                names.append(name)
                sizes.append(_sizes(module.weight, model.dtype, dtype))
                fixed -= sizes[-1][0]
        table = np.array(sizes, np.int64).reshape(len(names), len(CHOICES))
        return WeightChoices(tuple(names), table, fixed - sum(saved.values()), rounded_ends)

    def formats(self, chosen: Sequence[int] | Ints) -> dict[str, str]:
        """Returns the layers that a choice rounds, with their formats, `ends` among them.

        Args:
            chosen: of `CHOICES`, for every layer.
        """
        picked = {name: CHOICES[int(pick)] for name, pick in zip(self.names, chosen, strict=True) if pick}
        return {**self.ends, **picked}

    def bytes(self, chosen: Sequence[int] | Ints) -> int:
        """Returns the bytes of a checkpoint with a choice."""
        return self.fixed + int(self.sizes[np.arange(len(self.names)), np.asarray(chosen, np.int64)].sum())

    @property
    def key(self) -> list[Any]:
        """JSON values by which the choices are known in a fingerprint."""
        return [list(self.names), self.sizes.tolist(), self.fixed, self.ends]

    @property
    def smallest(self) -> Ints:
        """The choice of fewest bytes."""
        return np.asarray(self.sizes.argmin(axis=1))


def _can_choose(module: nn.Linear) -> bool:
    return all(can_hold_blocks(module, WEIGHT_TYPES[ROUNDED[kind]]) is None for kind in CHOICES[1:])


def _sizes(weight: torch.Tensor, own: torch.dtype, dtype: str) -> list[int]:
    outputs, inputs = weight.shape
    rounded = [outputs * WEIGHT_TYPES[ROUNDED[kind]].row_bytes(inputs) for kind in CHOICES[1:]]
    return [_stored(weight, own, dtype), *rounded]
