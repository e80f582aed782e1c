"""Registers moacompress with transformers: after this module is imported, `from_pretrained` loads compressed checkpoints.

The one path that keeps plain `from_pretrained`, `save_pretrained`, `device_map` and `dtype` for every model family is a
registered quantizer that quantizes nothing: it only puts the plan on the model.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from moacompress.errors import UnsupportedError
from moacompress.models import check_supported
from moacompress.runtime import attention
from moacompress.runtime.attaching import install
from moacompress.runtime.config import METHOD, MoaCompressConfig


@register_quantizer(METHOD)
class MoaCompressQuantizer(HfQuantizer):
    """Puts the plan of a checkpoint on the model that `from_pretrained` builds."""

    quantization_config: MoaCompressConfig

    def is_serializable(self) -> bool:
        """Compressed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The weights are ordinary float weights."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """The weights are ordinary float weights."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Needs nothing but transformers and torch."""

    def update_attn_implementation(self, config: Any) -> Any:
        """Refuses an attention implementation that would ignore the plan, and sets ours."""
        wanted = config._attn_implementation_internal
        if wanted not in (None, attention.NAME):
            raise UnsupportedError(
                f"attn_implementation={wanted!r} would ignore the plan; leave it out, or use moacompress.detach(model) after "
                "loading to get the dense model"
            )
        config._attn_implementation = attention.NAME
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if hasattr(model, "generation_config") or model.can_generate():
            check_supported(model)
        install(model, self.quantization_config.plan)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # float weights: without this transformers refuses .half(), .to(dtype) and the Trainer
        model.__dict__["is_quantized"] = False
        return model


def _guard_from_config() -> None:
    """Makes `from_config` refuse the config of a compressed checkpoint: it would build a dense model and say nothing."""
    original: Any = PreTrainedModel.__dict__["_from_config"].__func__

    @functools.wraps(original)
    def guarded(cls: type[PreTrainedModel], config: Any, **kwargs: Any) -> Any:
        found = getattr(config, "quantization_config", None)
        method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
        if method == METHOD:
            raise UnsupportedError(
                "from_config would build a dense model from a compressed checkpoint's config and ignore its plan; use "
                "from_pretrained, or delete config.quantization_config for a dense model"
            )
        return original(cls, config, **kwargs)

    guard: Any = classmethod(guarded)  # type: ignore[arg-type]
    setattr(PreTrainedModel, "_from_config", guard)  # noqa: B010  mypy takes an assignment for an override


attention.register()
_guard_from_config()
