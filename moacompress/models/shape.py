"""The shape that a transformers config describes."""

from __future__ import annotations

from typing import Any

from moacompress.core.errors import ModelError, one_line
from moacompress.models.support import native_windows, size_problems
from moacompress.rules.model_shape import ModelShape


def config_shape(config: Any, *, dtype: str, fingerprint: str = "") -> ModelShape:
    """Returns the shape that a transformers config describes.

    Raises:
        ModelError: the config lacks what a decoder with KV heads has.
    """
    text = config.get_text_config(decoder=True)
    problems = size_problems(text)
    if problems:
        raise ModelError(f"{getattr(text, 'model_type', 'the model')} {problems[0]}")
    try:
        layers, heads = int(text.num_hidden_layers), int(text.num_attention_heads)
        kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
        head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    except Exception as error:  # a config's properties raise whatever they like
        name = getattr(config, "model_type", "the model")
        raise ModelError(f"{name} is not a decoder with attention heads: {one_line(error)}") from error
    return ModelShape(
        model_type=str(text.model_type),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        native_windows=tuple(native_windows(text, layers)),
        weights_fingerprint=fingerprint,
    )
