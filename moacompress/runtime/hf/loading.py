"""Registers moacompress with transformers: after this module is imported, `from_pretrained` loads compressed checkpoints.

The one path that keeps plain `from_pretrained`, `save_pretrained`, `device_map` and `dtype` for every model family is a
registered quantizer that quantizes nothing: it puts the plan on the model, and layers for the weights that are in blocks.

A checkpoint is not trusted: its plan and config are compared before the model is built, the headers of its weight files
before a tensor is read, and a weight that no file holds is refused where transformers would draw it at random.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, modeling_utils
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from moacompress.core.errors import ArtefactError, UnsupportedError
from moacompress.models.block_layers import block_weights, put_block_layers, settle_scales
from moacompress.models.modules import check_supported, needed_weights
from moacompress.models.shape import config_shape
from moacompress.models.support import quantization_method
from moacompress.models.weight_files import check_beside, check_weights
from moacompress.runtime.compat import alternates, private_names
from moacompress.runtime.compat.http_errors import refusal
from moacompress.runtime.compat.private_names import check_installed
from moacompress.runtime.decode import attention
from moacompress.runtime.decode.context import NAME
from moacompress.runtime.hf.attaching import install, shard_to_local_heads
from moacompress.runtime.hf.config import METHOD, MoaCompressConfig
from moacompress.runtime.huge_pages import move_weights


class MoaCompressQuantizer(HfQuantizer):
    """Puts the plan of a checkpoint on the model that `from_pretrained` builds."""

    quantization_config: MoaCompressConfig

    def is_serializable(self) -> bool:
        """Compressed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The weights are ordinary float weights, or constants that adapters are trained on."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """The weights are ordinary float weights."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Needs nothing but transformers and torch, of versions that it can run with."""
        check_installed()

    def choose_attention(self, config: Any) -> Any:
        """Refuses an attention implementation that would ignore the plan, and sets ours."""
        wanted = config._attn_implementation_internal
        if wanted not in (None, NAME):
            raise refusal(
                f"attn_implementation={wanted!r} would ignore the plan; leave it out, or use moacompress.detach(model) after "
                "loading to get the dense model"
            )
        register()  # transformers may have been reloaded
        for part in (config, config.get_text_config(decoder=True)):
            setattr(part, private_names.IMPLEMENTATION, NAME)
        plan = self.quantization_config.plan
        plan.check_model(config_shape(config, dtype=plan.model.dtype), weights=False)
        if getattr(config, "dtype", None) is None:
            config.dtype = plan.model.dtype  # transformers would open the weights, pickles too, to find it out
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        model.__dict__[private_names.MISSING_WEIGHTS] = types.MethodType(_refuse_missing, model)
        if hasattr(model, "generation_config") or model.can_generate():
            check_supported(model)
        put_block_layers(model, _types_here(model, self.quantization_config.weights))
        install(model, self.quantization_config.plan)
        files = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
        for folder in sorted({*map(Path, filter(None, [model.name_or_path])), *(file.parent for file in files)}):
            check_beside(folder)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        check_weights(files, shapes, block_weights(model))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        settle_scales(model)
        shard_to_local_heads(model)
        # what is trained are float weights: without this transformers refuses .half(), .to(dtype) and the Trainer
        model.__dict__["is_quantized"] = False
        model.__dict__.pop(private_names.MISSING_WEIGHTS, None)
        move_weights(model)
        return model


setattr(MoaCompressQuantizer, alternates.CHOOSE_ATTENTION, MoaCompressQuantizer.choose_attention)


def _types_here(model: Any, kinds: Mapping[str, str]) -> dict[str, str]:
    """Returns the types of a causal language model's weights in blocks by the names that layers have in a model of its parts.

    A model without a head, or with another one, has no output layer, and the former names its layers without a prefix.
    """
    if model.get_output_embeddings() is not None:
        return dict(kinds)
    prefix = f"{model.base_model_prefix}."
    inside = {name: kind for name, kind in kinds.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): kind for name, kind in inside.items()} if model.base_model is model else inside


def _refuse_missing(model: Any, missing: Any, *args: Any, **kwargs: Any) -> None:
    """Stands in for the model's `private_names.MISSING_WEIGHTS` while a compressed checkpoint is loaded.

    A head that is new, such as a classifier on the checkpoint of a language model, is still drawn at random.

    Raises:
        ArtefactError: a weight of the checkpoint's own model is missing or has another shape.
    """
    tied = model.all_tied_weights_keys
    there = {name for pair in tied.items() for name in pair if not set(pair) <= set(missing)}
    prefix = f"{model.base_model_prefix}."
    own = model.base_model is model or model.can_generate()
    lost = sorted(
        name for name in set(missing) & needed_weights(model).keys() - there if own or name.startswith(prefix)
    )
    if lost:
        raise ArtefactError(
            f"the compressed checkpoint lacks {len(lost)} of its weights, or holds them in another shape, such as {lost[0]}; "
            "transformers would draw them at random, so export it again"
        )
    getattr(type(model), private_names.MISSING_WEIGHTS)(model, missing, *args, **kwargs)


def _guard_from_config() -> None:
    """Makes `from_config` refuse the config of a compressed checkpoint: it would build a dense model and say nothing.

    This is a patch because transformers asks nobody there: no quantizer has a part in a model that is built from a config, and
    a config that was read from a file holds the plan as a plain dictionary. All ways to build one, of every auto class and of
    a model's own, end in one class method, which is wrapped. For any other config the wrapper hands on at once. It is put on
    once: a wrapper of an earlier import of this module goes.
    """
    base: Any = modeling_utils.PreTrainedModel
    own: Any = vars(base)[private_names.FROM_CONFIG].__func__
    code = getattr(own, "__code__", None)
    if code is not None and code.co_filename == _guard_from_config.__code__.co_filename:
        own = own.__wrapped__

    @functools.wraps(own)
    def guarded(cls: type[PreTrainedModel], config: Any, **kwargs: Any) -> Any:
        if quantization_method(config) == METHOD and not _is_being_loaded(config):
            raise UnsupportedError(
                "from_config would build a dense model from a compressed checkpoint's config and ignore its plan; use "
                "from_pretrained, or delete config.quantization_config for a dense model"
            )
        return own(cls, config, **kwargs)

    setattr(base, private_names.FROM_CONFIG, classmethod(guarded))  # type: ignore[arg-type]


def _is_being_loaded(config: Any) -> bool:
    """Whether `from_pretrained` builds a part of a model like this, on "meta"; the plan is put on it afterwards."""
    return isinstance(config.quantization_config, MoaCompressConfig) and torch.get_default_device().type == "meta"


def register() -> None:
    """Makes all of this known to transformers; what it knows already stays, so it may be called often."""
    configs, quantizers = (
        private_names.resolve(private_names.QUANTIZATION_CONFIGS),
        private_names.resolve(private_names.QUANTIZERS),
    )
    known: tuple[tuple[dict[str, type], Any, type], ...] = (
        (configs, register_quantization_config, MoaCompressConfig),
        (quantizers, register_quantizer, MoaCompressQuantizer),
    )
    for mapping, registering, ours in known:
        if mapping.get(METHOD) is not ours:
            mapping.pop(METHOD, None)  # of an earlier import of this module: transformers refuses a second one
            registering(METHOD)(ours)
    attention.register()
    _guard_from_config()


register()
