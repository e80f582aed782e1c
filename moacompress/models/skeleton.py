"""A model of its config alone: what reads the config of MODEL, and the modules without memory for weights."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import TYPE_CHECKING

from moacompress.core.errors import ModelError, one_line
from moacompress.models.gguf_reading import reading_once
from moacompress.models.source import locate_source
from moacompress.models.weight_files import PICKLES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def load_config(source: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Returns the config of MODEL: a hub id, a folder, or a `.gguf` file.

    Raises:
        ModelError: it has none that transformers knows.
    """
    from transformers import AutoConfig

    name, arguments = locate_source(source)
    try:
        with reading_once() if "gguf_file" in arguments else contextlib.nullcontext():
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                name, trust_remote_code=trust_remote_code, **arguments
            )
        return config
    except ImportError as error:
        raise ModelError(f"{source} needs a package that is not installed: {error}") from error
    except Exception as error:  # damaged files raise whatever their parsers raise
        raise ModelError(f"{source} is not a model that transformers knows: {one_line(error)}") from error


def make_skeleton(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """Returns the model without memory for its weights, which are on "meta".

    Raises:
        ModelError: transformers has no causal language model for this config.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the skeleton has no weights to be quantized
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config that contradicts itself raises whatever the modules raise
        raise ModelError(f"{config.model_type} is not a causal language model: {one_line(error)}") from error
    return model


def is_described(source: str) -> bool:
    """Returns whether MODEL is a folder with a config and without weights."""
    folder = Path(source)
    if not (folder / "config.json").is_file():
        return False
    return not any(next(folder.glob(pattern), None) for pattern in ("*.safetensors*", *PICKLES))
