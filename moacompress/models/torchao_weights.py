"""Weights that torchao quantized: they become floats as a model is loaded.

transformers loads such a checkpoint with tensors of torchao's own in the place of weights. These have no memory of their own
that could be hashed, and cannot stand in a checkpoint whose `quantization_config` is a plan's. Each knows what it stands for,
which is what its products are made with up to rounding; so that is taken, as with a `.gguf` file's blocks that no layer
multiplies with.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch

from moacompress.core.errors import ModelError
from moacompress.core.tables import readable_bytes

logger = logging.getLogger(__name__)


def with_floats(model: Any, trust_remote_code: bool = False) -> Any:
    """Returns the model with the numbers that torchao's tensors stand for in their place, in its dtype.

    It is built from its config, without the mark of a quantization: transformers keeps with a model how its weights were
    converted on loading, and would convert floats back when they are saved.
    """
    from torchao.utils import TorchAOBaseTensor
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    del config.quantization_config
    numbers: dict[str, torch.Tensor] = {}
    count = before = after = 0
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, TorchAOBaseTensor):
            numbers[name] = _numbers(name, tensor).to(model.dtype).contiguous()
            count, before, after = count + 1, before + _bytes(tensor), after + numbers[name].nbytes
        else:
            numbers[name] = tensor
    logger.warning(
        "%d weights are quantized by torchao (%s) and become floats (%s); --weights int8 or int4 rounds them again",
        count,
        readable_bytes(before),
        readable_bytes(after),
    )
    made: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype, trust_remote_code=trust_remote_code)
    made.load_state_dict(numbers, assign=True)
    made.tie_weights()
    made.generation_config = model.generation_config
    return made


def _numbers(name: str, tensor: Any) -> torch.Tensor:
    """Returns the numbers of one of torchao's tensors.

    Raises:
        ModelError: its type has no way back to numbers.
    """
    try:
        found: torch.Tensor = tensor.dequantize()
    except (AttributeError, NotImplementedError) as error:
        raise ModelError(
            f"{name} is a {type(tensor).__name__} of torchao, which gives no numbers back; take the model before it was "
            "quantized, and --weights int4 rounds it"
        ) from error
    return found


def _bytes(tensor: Any) -> int:
    """Returns the bytes of the tensors that one of torchao's is made of."""
    names, _ = tensor.__tensor_flatten__()
    return sum(getattr(tensor, name).nbytes for name in names)
