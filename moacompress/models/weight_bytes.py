"""Weight bytes: what weights take in a model, in the files of a checkpoint and in memory, counted here and nowhere else.

By type they are those of the blocks that weights are in, such as Q8_0, or of dtypes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moacompress.models.placement import tensors_once
from moacompress.models.stored_plan import checkpoint_weights
from moacompress.models.weight_files import FLOAT_BYTES, FLOAT_NAMES, OTHER_BYTES, loaded_files, read_header
from moacompress.rules.formats import DTYPE_BYTES
from moacompress.rules.model_shape import ModelShape

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

HEADER_BYTES = 160
"""Most bytes that the header of a safetensors file takes for a tensor, beside its name, and for the file itself."""
GATE_HEADER_BYTES = 320
"""Most bytes of the names, headers and biases of a layer's gates in a checkpoint."""


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Returns the bytes of a model's weights by type; a shared weight counts once."""
    from moacompress.models.block_layers import block_weights

    kinds, found = block_weights(model), dict[str, int]()
    for name, tensor in tensors_once(model):
        kind = kinds[name].name if name in kinds else str(tensor.dtype).removeprefix("torch.")
        found[kind] = found.get(kind, 0) + tensor.nbytes
    return found


def resident_bytes(model: nn.Module) -> int:
    """Returns the bytes of memory that weights and buffers are in, those that no checkpoint stores included."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def checkpoint_weight_bytes(folder: Path) -> dict[str, int]:
    """Returns the bytes of a compressed checkpoint's weights by type; nothing where it has none.

    Raises:
        ArtefactError, PlanError: the checkpoint is damaged.
    """
    types, found = checkpoint_weights(folder), dict[str, int]()
    for file in loaded_files(folder):
        for name, tensor in read_header(file).items():
            kind = types.get(name.removesuffix(".weight"), FLOAT_NAMES.get(tensor.dtype, tensor.dtype))
            size = {**FLOAT_BYTES, **OTHER_BYTES}.get(tensor.dtype, 1)
            found[kind] = found.get(kind, 0) + tensor.numbers * size
    return found


def loaded_weight_bytes(folder: Path, dtype: str) -> int:
    """Returns the bytes of a compressed checkpoint's weights once it is loaded in a dtype; blocks stay as they are.

    Raises:
        ArtefactError, PlanError: the checkpoint is damaged.
    """
    stored = checkpoint_weight_bytes(folder).items()
    return sum(size // DTYPE_BYTES[kind] * DTYPE_BYTES[dtype] if kind in DTYPE_BYTES else size for kind, size in stored)


def most_checkpoint_bytes(model: PreTrainedModel, dtype: str, gated: ModelShape | None = None) -> int:
    """Returns the most bytes that a checkpoint's weight files take, their headers counted; a shared weight counts once.

    Floats of the model's dtype are saved in `dtype`, and blocks as they are. `gated` is the shape where each KV head gets a
    gate.
    """
    total = HEADER_BYTES
    for name, tensor in tensors_once(model):
        size = tensor.numel() * DTYPE_BYTES[dtype] if tensor.dtype == model.dtype else tensor.nbytes
        total += size + len(name.encode()) + HEADER_BYTES
    if gated is not None:
        hidden = model.config.get_text_config(decoder=True).hidden_size
        total += gated.layers * (gated.kv_heads * (hidden + 1) * DTYPE_BYTES[dtype] + GATE_HEADER_BYTES)
    return total
