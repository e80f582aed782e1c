"""A `.gguf` file as a model whose weights stay in the blocks of the file.

transformers turns all of a file into floats. Here the tensors of some architectures are read one by one: matrices that the
kernels multiply as they lie keep their bytes, anything else becomes floats of the model's dtype. What llama.cpp changes on
conversion is taken back: rows of queries and keys that it reorders are whole blocks, so codes stay what they are.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moacompress.core.arrays import row_parts
from moacompress.core.errors import ModelError
from moacompress.core.tables import readable_bytes
from moacompress.models.gguf_config import FREQUENCIES
from moacompress.models.modules import needed_weights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from moacompress.kernels.weight_blocks import WeightType

logger = logging.getLogger(__name__)

NUMBERS_AT_ONCE = 1 << 22
"""Of a tensor that is turned into floats, at a time."""


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp changes in the tensors of an architecture.

    Attributes:
        reordered: rows of queries and keys are in pairs of what is rotated together; transformers has the halves of a head.
        norm_offset: what is added to the weights of norms.
    """

    reordered: bool = False
    norm_offset: float = 0.0


ARCHITECTURES = {
    "llama": Architecture(reordered=True),  # mistral's too
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "gemma2": Architecture(norm_offset=1.0),
    "gemma3": Architecture(norm_offset=1.0),
}
"""Architectures that are read here, by the file's name for them; others are left to transformers."""


def load_gguf(file: Path, reader: Any, config: Any, dtype: torch.dtype) -> PreTrainedModel | None:
    """Loads a `.gguf` file, which is not trusted, with its matrices as they are, to compute in `dtype`.

    Returns:
        The model, weights frozen; None, after a warning, where the weights cannot stay in blocks, or there are none.

    Raises:
        ModelError: the file lacks a weight of the model, or holds one of another shape.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from moacompress.models.block_layers import can_hold_blocks, put_block_layer

    tensors = {str(tensor.name): tensor for tensor in reader.tensors}
    kinds = {name: _kind(tensor) for name, tensor in tensors.items()}
    if not any(kinds.values()):
        return None
    named = _architecture(reader)
    if named not in ARCHITECTURES:
        logger.warning(
            "the weights of %s are turned into floats, which takes several times the memory: of the architecture %s blocks are "
            "not read as they are; of %s they are",
            file.name,
            named,
            ", ".join(ARCHITECTURES),
        )
        return None
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    names = _names(model, named)
    floats: dict[str, list[int]] = {}
    for name, shape in _own_weights(model).items():
        tensor = tensors.get(names.get(name, ""))
        if tensor is None:
            raise ModelError(f"{file} lacks weights of the model, such as {name}, which would be drawn at random")
        if tuple(int(size) for size in reversed(tensor.shape)) != shape:
            found = [int(size) for size in reversed(tensor.shape)]
            raise ModelError(f"{file} has a tensor {tensor.name} of shape {found}, the model needs {list(shape)}")
        order = _order(name, shape[0], config) if ARCHITECTURES[named].reordered else None
        module, _, leaf = name.rpartition(".")
        kind = kinds[str(tensor.name)]
        reason = "no compiled kernel multiplies with them" if kind is None else None
        if kind is not None:
            reason = can_hold_blocks(model.get_submodule(module), kind) if leaf == "weight" else "it is no matrix"
        if kind is not None and reason is None:
            blocks = np.array(tensor.data if order is None else tensor.data[order])
            put_block_layer(model, module, kind, torch.from_numpy(blocks))
            continue
        type_name = str(tensor.tensor_type.name)
        if type_name not in ("F64", "F32", "F16", "BF16"):
            floats.setdefault(f"{type_name} ({reason})", []).append(math.prod(shape))
        numbers = _numbers(tensor, dtype, ARCHITECTURES[named].norm_offset if "norm" in name else 0.0)
        numbers = numbers if order is None else numbers[order]
        model.get_submodule(module).register_parameter(leaf, torch.nn.Parameter(numbers, requires_grad=False))
    _warn(file, floats, dtype)
    _tie(model)
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    return loaded


def check_all_read(file: Path, reader: Any, model: PreTrainedModel) -> None:
    """Refuses a model that was loaded from a file of which it has not all tensors: it would compute something else.

    Of architectures that are not read here nothing is known.

    Raises:
        ModelError: there are such tensors.
    """
    named = _architecture(reader)
    if named not in ARCHITECTURES:
        return
    known = {*_names(model, named).values(), FREQUENCIES}
    left = [name for tensor in reader.tensors if (name := str(tensor.name)) not in known]
    if left:
        raise ModelError(
            f"{file} holds {len(left)} tensors that transformers' model of the architecture {named} has no place for, such as "
            f"{left[0]}; give the checkpoint that it was made from"
        )


def _kind(tensor: Any) -> WeightType | None:
    from moacompress.kernels.weight_blocks import WEIGHT_TYPES

    return WEIGHT_TYPES.get(str(tensor.tensor_type.name)) if len(tensor.shape) == 2 else None


def _architecture(reader: Any) -> str:
    field = reader.fields.get("general.architecture")
    return "" if field is None else bytes(field.parts[field.data[0]]).decode(errors="replace")


def _names(model: Any, architecture: str) -> dict[str, str]:
    """Returns the file's names of a model's weights."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    known = get_tensor_name_map(arch, model.config.get_text_config(decoder=True).num_hidden_layers)
    found = {}
    for name in needed_weights(model):
        stem, _, suffix = name.rpartition(".")
        base = known.get_name(stem)
        if base is not None:
            found[name] = f"{base}.{suffix}"
    return found


def _own_weights(model: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the weights that a file holds, by name: of two that are tied the first."""
    tied = model.all_tied_weights_keys
    return {name: shape for name, shape in needed_weights(model).items() if name not in tied}


def _order(name: str, rows: int, config: Any) -> npt.NDArray[np.intp] | None:
    """Returns the row of the file that each row of a weight is, or None where rows are in order."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    return None if heads is None else np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(rows)


def _numbers(tensor: Any, dtype: torch.dtype, offset: float) -> torch.Tensor:
    """Returns a tensor of a file in floats, some rows at a time."""
    import torch
    from gguf import dequantize

    shape = [int(size) for size in reversed(tensor.shape)]
    out = torch.empty(shape, dtype=dtype)
    parts = row_parts(shape[0], math.prod(shape[1:]), NUMBERS_AT_ONCE) if len(shape) > 1 else [slice(None)]
    for part in parts:
        found = torch.from_numpy(np.array(dequantize(tensor.data[part], tensor.tensor_type)))
        out[part] = (found - offset if offset else found).to(dtype)
    return out


def _warn(file: Path, floats: dict[str, list[int]], dtype: torch.dtype) -> None:
    """Warns once of what is blocks in the file and floats in the model."""
    if not floats:
        return
    count = sum(map(len, floats.values()))
    taken = readable_bytes(sum(map(sum, floats.values())) * dtype.itemsize)
    logger.warning(
        "%d weights of %s are turned into %s, %s: %s",
        count,
        file.name,
        str(dtype).removeprefix("torch."),
        taken,
        "; ".join(f"{len(sizes)} of type {kind}" for kind, sizes in sorted(floats.items())),
    )


def _tie(model: Any) -> None:
    """Makes weights that are one tensor one parameter, in blocks where the stored one is."""
    from moacompress.models.block_layers import block_weights, put_block_layer

    kinds = block_weights(model)
    for target, source in model.all_tied_weights_keys.items():
        name, _, leaf = target.rpartition(".")
        if source in kinds:
            put_block_layer(model, name, kinds[source])
        model.get_submodule(name).register_parameter(leaf, model.get_parameter(source))
