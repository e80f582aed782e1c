"""MODEL by its config alone: its shape and bytes, and its modules without memory for weights; no weights are loaded."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moacompress.core.artefact_names import PLAN_FILE
from moacompress.core.errors import ModelError, one_line
from moacompress.models.gguf_reading import reading_once
from moacompress.models.modules import check_supported
from moacompress.models.shape import config_shape
from moacompress.models.source import is_compressed, locate_source
from moacompress.models.weight_files import PICKLES, gguf_dtype, stored_dtype
from moacompress.rules.formats import DTYPE_BYTES, dtype_name
from moacompress.rules.model_shape import ModelShape

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


@dataclass(frozen=True)
class DescribedModel:
    """A dense model before its weights are loaded.

    Attributes:
        shape: without a fingerprint; its dtype is the checkpoint's own.
        context: longest sequence that it was made for, tokens; None where its config does not say.
        weight_bytes: of its weights once they are loaded: a `.gguf` file's stay in blocks.
    """

    shape: ModelShape
    context: int | None
    weight_bytes: int

    @staticmethod
    def of(source: str, trust_remote_code: bool = False) -> DescribedModel:
        """Reads the config of a hub id, a folder or a `.gguf` file.

        Raises:
            ModelError: it is no model that can be compressed.
        """
        config: Any = load_config(source, trust_remote_code)
        model = make_skeleton(config, trust_remote_code)
        check_supported(model)
        is_gguf = "gguf_file" in locate_source(source)[1]
        if is_gguf:
            from gguf import GGUFReader

            dtype = gguf_dtype(GGUFReader(source))
        elif config.dtype is not None:
            dtype = dtype_name(str(config.dtype))
        else:
            dtype = stored_dtype(Path(source)) or "float32"
        if dtype not in DTYPE_BYTES:
            raise ModelError(f"the dtype {dtype} of {source} is not one of {', '.join(DTYPE_BYTES)}")
        context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        counted = DTYPE_BYTES[dtype] * sum(weight.numel() for weight in model.parameters())
        size = Path(source).stat().st_size if is_gguf else counted
        return DescribedModel(config_shape(config, dtype=dtype), context, size)


def is_dense_model(path: Path) -> bool:
    """Returns whether a path is a `.gguf` file, or a folder that has a model's config and no plan."""
    if path.is_file():
        return path.suffix == ".gguf"
    return (path / "config.json").is_file() and not (path / PLAN_FILE).is_file() and not is_compressed(path)
