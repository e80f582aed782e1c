"""What the weights of a model take in a checkpoint."""

from __future__ import annotations

from torch import nn

from moacompress.models.placement import tensors_once
from moacompress.rules.formats import DTYPE_BYTES

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
        size = tensor.numel() * DTYPE_BYTES[dtype] if tensor.dtype == own else tensor.nbytes
        total += size + len(name.encode()) + HEADER_BYTES
    return total
