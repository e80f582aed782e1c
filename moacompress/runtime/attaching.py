"""Puts a plan on a model and takes it off again: hooks on the decoder and its attention modules, and refusals.

The hooks hold no state of a forward: the plan's part of a layer is fixed, and what changes lives in the cache.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from moacompress.errors import MoaCompressError, PlanError, UnsupportedError
from moacompress.models import attention_modules, check_supported, config_shape
from moacompress.plan import Plan
from moacompress.runtime.attention import CONTEXT, NAME, UNEQUAL_LENGTHS, LayerContext
from moacompress.runtime.cache import PlanCache, rule_groups
from moacompress.runtime.config import MoaCompressConfig

Model = TypeVar("Model", bound=PreTrainedModel)
_CACHE_NAMES = ("cache", "past_key_values", "layer_past")


@dataclass
class _Attachment:
    """What `detach` must undo."""

    plan: Plan
    handles: list[Any]
    implementations: list[tuple[Any, str | None]]


def attach(model: Model, plan: Plan) -> Model:
    """Makes a loaded dense model run under a plan, in place, without an export.

    Another plan on the model is replaced. `save_pretrained` then writes a compressed checkpoint.

    Args:
        model: a causal LM that transformers loaded.
        plan: a plan for a model of this shape.

    Returns:
        The same model.

    Raises:
        PlanError: the plan is for a model of another shape.
        ModelError: the model can not be compressed.
    """
    check_supported(model)
    if getattr(model, "_moacompress", None) is not None:
        detach(model)
    if getattr(model.config, "quantization_config", None) is not None:
        raise PlanError("the model's weights are quantized; attach a plan to a model with float weights")
    install(model, plan)
    model.config.quantization_config = MoaCompressConfig(plan=plan)
    return model


def detach(model: Model) -> Model:
    """Takes the plan off a model: it is dense again.

    Args:
        model: a model that `attach` or `from_pretrained` put a plan on; any other is left as it is.

    Returns:
        The same model.
    """
    attachment: _Attachment | None = getattr(model, "_moacompress", None)
    if attachment is None:
        return model
    for handle in attachment.handles:
        handle.remove()
    for name in _OVERRIDES:
        model.__dict__.pop(name, None)
    for config, implementation in attachment.implementations:
        config._attn_implementation_internal = implementation
    del model.__dict__["_moacompress"]
    if isinstance(getattr(model.config, "quantization_config", None), MoaCompressConfig):
        del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    return model


def attached_plan(model: torch.nn.Module) -> Plan | None:
    """Returns the plan that a model runs under, or None."""
    attachment: _Attachment | None = getattr(model, "_moacompress", None)
    return attachment.plan if attachment is not None else None


def install(model: PreTrainedModel, plan: Plan) -> None:
    """Puts hooks, refusals and the attention implementation of a plan on a model.

    Raises:
        PlanError: the plan is for a model of another shape.
    """
    plan.check_model(config_shape(model.config, dtype=plan.model.dtype), weights=False)
    modules = attention_modules(model)
    if len(modules) != plan.model.layers:
        raise PlanError(f"the plan has {plan.model.layers} layers, the model has attention in {len(modules)}")
    decoder = model.get_decoder() or model.base_model
    handles = [decoder.register_forward_pre_hook(_DecoderHook(plan, decoder), with_kwargs=True)]
    for layer, module in enumerate(modules):
        handles.append(module.register_forward_pre_hook(_AttentionHook(_context(plan, layer)), with_kwargs=True))
    implementations = []
    for config in {id(c): c for c in (m.config for m in model.modules() if isinstance(m, PreTrainedModel))}.values():
        before = config._attn_implementation_internal
        if before in (None, NAME):  # loading a compressed checkpoint has set ours already
            before = "sdpa" if model._supports_sdpa else "eager"
        implementations.append((config, before))
        config._attn_implementation_internal = NAME
    for name, override in _OVERRIDES.items():
        setattr(model, name, types.MethodType(override, model))
    model.__dict__["_moacompress"] = _Attachment(plan, handles, implementations)


def _context(plan: Plan, layer: int) -> LayerContext:
    return LayerContext(
        layer=layer,
        groups=rule_groups(plan.rules[layer]),
        kv_heads=plan.model.kv_heads,
        min_window=plan.min_window,
        native_window=plan.model.native_windows[layer],
    )


@dataclass
class _AttentionHook:
    """Hands a layer's part of the plan, and its cache, to the attention."""

    context: LayerContext

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if module.config._attn_implementation != NAME:
            raise UnsupportedError(
                f"the attention implementation was changed to {module.config._attn_implementation!r}, which would ignore "
                "the plan; use moacompress.detach(model) to get the dense model back"
            )
        cache = next((kwargs[name] for name in _CACHE_NAMES if kwargs.get(name) is not None), None)
        layer = None if cache is None else cache.layers[self.context.layer]
        return args, {**kwargs, CONTEXT: replace(self.context, cache=layer)}


class _DecoderHook:
    """Checks the inputs of a forward and brings the cache."""

    def __init__(self, plan: Plan, decoder: torch.nn.Module) -> None:
        self.plan = plan
        self.plan_key = plan.key()
        parameters = inspect.signature(type(decoder).forward).parameters
        self.names = [name for name in parameters if name not in ("self", "args", "kwargs")]

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        name = next((n for n in _CACHE_NAMES if kwargs.get(n) is not None), "cache")
        cache = check_cache(kwargs.get(name), self.plan_key)
        if cache is None and self._wants_cache(module, kwargs):
            cache = PlanCache(self.plan)
            kwargs[name] = cache
        past = cache.get_seq_length() if cache is not None else 0
        _check_mask(kwargs.pop("attention_mask", None))
        _check_positions(kwargs, past)
        _check_rest(module, kwargs)
        return (), kwargs

    @staticmethod
    def _wants_cache(module: Any, kwargs: dict[str, Any]) -> bool:
        wanted = kwargs.get("use_cache")
        if wanted is None:
            wanted = getattr(module.config, "use_cache", False)
        return bool(wanted) and not (getattr(module, "gradient_checkpointing", False) and module.training)


def check_cache(cache: Any, plan_key: str) -> PlanCache | None:
    """Returns the cache if it is one that this plan can use.

    Raises:
        UnsupportedError: another kind of cache, or one of another plan.
    """
    if cache is None or (isinstance(cache, PlanCache) and cache.plan_key == plan_key):
        return cache
    if isinstance(cache, PlanCache):
        raise UnsupportedError("the cache belongs to another plan; start a new one for this model")
    raise UnsupportedError(
        f"a compressed model brings its own cache and can not use a {type(cache).__name__}; pass no cache, or the one that "
        "the model returned"
    )


def _check_mask(mask: Any) -> None:
    """Refuses a mask that hides anything; one that does not is not needed."""
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise UnsupportedError(
            f"an attention mask of shape {shape} is not supported by a compressed model; pass a 2-D one of ones"
        )
    if not bool((mask != 0).all()):
        raise UnsupportedError(UNEQUAL_LENGTHS)


def _check_positions(kwargs: dict[str, Any], past: int) -> None:
    positions = kwargs.get("position_ids")
    if positions is None:
        return
    wanted = torch.arange(past, past + positions.shape[-1], device=positions.device)
    if positions.ndim != 2 or not bool((positions == wanted).all()):
        raise UnsupportedError(
            "position_ids that do not count on from the cache (packed sequences, or gaps) are not supported by a compressed "
            "model; leave them out"
        )


def _check_rest(module: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions") or (
        kwargs.get("output_attentions") is None and getattr(module.config, "output_attentions", False)
    ):
        raise UnsupportedError("output_attentions is not supported: a compressed model never makes the whole matrix")
    if any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k")):
        raise UnsupportedError("packed sequences (cu_seq_lens) are not supported by a compressed model")
    if getattr(module.config, "is_causal", True) is False or kwargs.get("is_causal") is False:
        raise UnsupportedError("is_causal=False is not supported: a plan is made for causal attention")


def _prepare_cache(
    self: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: GenerationMode,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Stands in for `GenerationMixin._prepare_cache_for_generation`."""
    plan = attached_plan(self)
    if plan is None:
        raise MoaCompressError("the plan was taken off this model by hand; use moacompress.detach(model)")
    if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or generation_config.is_assistant:
        what = "as an assistant" if generation_config.is_assistant else f"with {generation_mode.value}"
        raise UnsupportedError(
            f"generating {what} is not supported by a compressed model; use greedy search or sampling"
        )
    if generation_config.cache_implementation is not None:
        raise UnsupportedError(
            f"cache_implementation={generation_config.cache_implementation!r} is not supported: a compressed model brings "
            "its own cache; leave it out"
        )
    cache = check_cache(model_kwargs.get("cache"), plan.key())
    if cache is not None:
        cache._is_user_defined = True
    elif generation_config.use_cache is not False:
        model_kwargs["cache"] = PlanCache(plan)


def _refuse_other_attention(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
    if attn_implementation != NAME:
        raise UnsupportedError(
            f"set_attn_implementation({attn_implementation!r}) would ignore the plan; use moacompress.detach(model) to get the "
            "dense model back"
        )


def _refuse_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> None:
    raise UnsupportedError(
        "continuous batching and paged caches are not supported by a compressed model; use model.generate with its own cache"
    )


_OVERRIDES: dict[str, Callable[..., Any]] = {
    "_prepare_cache_for_generation": _prepare_cache,
    "set_attn_implementation": _refuse_other_attention,
    "generate_batch": _refuse_continuous_batching,
    "init_continuous_batching": _refuse_continuous_batching,
    "continuous_batching_context_manager": _refuse_continuous_batching,
}
"""Methods of a model that stand in for transformers' own while a plan is attached."""
