"""What MODEL's config says of it; no weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moacompress.core.artefact_names import PLAN_FILE
from moacompress.core.errors import ModelError
from moacompress.models.modules import check_supported
from moacompress.models.shape import config_shape
from moacompress.models.skeleton import load_config, make_skeleton
from moacompress.models.source import is_compressed, locate_source
from moacompress.models.weight_files import gguf_dtype, stored_dtype
from moacompress.rules.formats import DTYPE_BYTES, dtype_name
from moacompress.rules.model_shape import ModelShape


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
        dtype = _own_dtype(source, config)
        if dtype not in DTYPE_BYTES:
            raise ModelError(f"the dtype {dtype} of {source} is not one of {', '.join(DTYPE_BYTES)}")
        context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        counted = DTYPE_BYTES[dtype] * sum(weight.numel() for weight in model.parameters())
        size = Path(source).stat().st_size if _is_gguf(source) else counted
        return DescribedModel(config_shape(config, dtype=dtype), context, size)


def is_dense_model(path: Path) -> bool:
    """Returns whether a path is a `.gguf` file, or a folder that has a model's config and no plan."""
    if path.is_file():
        return path.suffix == ".gguf"
    return (path / "config.json").is_file() and not (path / PLAN_FILE).is_file() and not is_compressed(path)


def _is_gguf(source: str) -> bool:
    return "gguf_file" in locate_source(source)[1]


def _own_dtype(source: str, config: Any) -> str:
    """Returns the dtype that `load_source` would find to be the checkpoint's own."""
    if _is_gguf(source):
        from gguf import GGUFReader

        return gguf_dtype(GGUFReader(source))
    if config.dtype is not None:
        return dtype_name(str(config.dtype))
    return stored_dtype(Path(source)) or "float32"
