"""Puts a plan on a model and takes it off again."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from moacompress.core.errors import MoaCompressError, PlanError, UnsupportedError
from moacompress.kernels.dispatch import check_formats
from moacompress.models.block_layers import weight_types
from moacompress.models.modules import attention_modules, check_supported, check_unwrapped, is_pretrained
from moacompress.models.placement import layer_devices
from moacompress.models.shape import config_shape
from moacompress.models.tensor_parallel import own_heads
from moacompress.rules.plan import Plan
from moacompress.rules.share import reuse_layers_of
from moacompress.runtime.cache.kept_prefixes import KeptPrefixes
from moacompress.runtime.compat.private_names import check_installed
from moacompress.runtime.decode import attention
from moacompress.runtime.decode.all_layers import Stack
from moacompress.runtime.decode.context import NAME, AttentionHook, LayerContext
from moacompress.runtime.decode.fused import are_fused, fuse, read_layers, unfuse
from moacompress.runtime.gate import gates_of, gates_on, put_gates, take_gates_off
from moacompress.runtime.hf import ops  # noqa: F401  registers what a compiled model calls
from moacompress.runtime.hf.config import MoaCompressConfig
from moacompress.runtime.hf.generation import OVERRIDES
from moacompress.runtime.hf.hooks import DecoderHook
from moacompress.runtime.hf.layer_order import LayerOrder
from moacompress.runtime.hf.prefixes import GENERATE, keep_prefixes, limit_in_environment
from moacompress.runtime.linear import install_kernel, uninstall_kernel
from moacompress.runtime.sharing.projections import Dropped, drop_projections

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass
class _Attachment:
    """What `detach` must undo; of a checkpoint that was loaded without some projections those are not there to give back.

    Attributes:
        plan: of the whole model.
        own: of the KV heads that are here: all, or those of a rank of tensor parallelism.
        decoder_hook: has `own`.
        layer_hooks: have its layers.
        linear: layers whose products go to what is quickest.
    """

    plan: Plan
    own: Plan
    decoder_hook: DecoderHook
    layer_hooks: list[AttentionHook]
    handles: list[Any]
    implementations: list[tuple[Any, str | None]]
    linear: list[torch.nn.Module]
    dropped: list[Dropped] | None
    prefixes: KeptPrefixes | None = None


def attach(model: Model, plan: Plan | str | Path) -> Model:
    """Makes a loaded dense model run under a plan, in place, without an export.

    Another plan on the model is replaced, and stays where this one is refused. `save_pretrained` then writes a compressed
    checkpoint. The model gets a config of its own, a copy, in place of the one that it may share with other models and the
    caller; `detach` leaves it that.

    Args:
        model: a causal LM that transformers loaded.
        plan: a plan for a model of this shape, or its file, which has its gates beside it.

    Returns:
        The same model.

    Raises:
        PlanError: the file is not a valid plan; or the plan is for a model of another shape, or its gates are not at hand.
        ModelError: the model cannot be compressed.
        UnsupportedError: the version of transformers is not tested, and lacks what moacompress leans on; or the plan has a
            format of an installed package, which the kernel does not keep.
    """
    check_installed()
    check_unwrapped(model)
    if not isinstance(plan, Plan):
        plan = Plan.load(plan)
    check_supported(model)
    if not isinstance(getattr(model.config, "quantization_config", None), MoaCompressConfig | None):
        raise PlanError("the model's weights are quantized; attach a plan to a model with float weights")
    modules = _fitting_modules(model, plan)
    gates_of(plan, model_inputs(model))  # which are at hand, and fit
    limit, earlier = limit_in_environment(model), attached_plan(model)
    with torch.inference_mode(False):  # what a plan puts on a model may take part in its training
        detach(model)
        try:
            dropped = drop_projections(model, plan)
            put_gates(modules, plan, model_inputs(model), model.dtype, devices=layer_devices(model))
            _take_own_configs(model)
            _put(model, plan, modules, dropped, limit)
            shard_to_local_heads(model)
        except MoaCompressError:
            detach(model)
            if earlier is not None:
                attach(model, earlier)
            raise
    model.config.quantization_config = MoaCompressConfig(plan=plan, weights=weight_types(model))
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
    if attachment.dropped is None and attachment.plan.shares:
        raise UnsupportedError(
            "layers of this checkpoint that share attention have no queries and keys of their own, so it cannot be made dense; "
            "load the dense model"
        )
    for handle in attachment.handles:
        handle.remove()
    for dropped in attachment.dropped or ():
        dropped.give_back()
    for module in model.modules():
        unfuse(module)
    take_gates_off(attention_modules(model))
    for layer in attachment.linear:
        uninstall_kernel(layer)
    for name in (*OVERRIDES, GENERATE):
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
    """Returns the plan that a model runs under, with the gates that are on it, or None."""
    attachment: _Attachment | None = getattr(model, "_moacompress", None)
    if attachment is None or not attachment.plan.selects:
        return attachment.plan if attachment is not None else None
    return replace(attachment.plan, gate_weights=gates_on(attention_modules(model)))


def own_plan(model: torch.nn.Module) -> Plan | None:
    """Returns the plan of what of a model is here, which is that of its cache: all, or the KV heads of a rank; or None."""
    attachment: _Attachment | None = getattr(model, "_moacompress", None)
    return None if attachment is None else attachment.own


def give_notes(model: PreTrainedModel, plan: Plan) -> None:
    """Gives a compressed model the same plan with other notes, for its config.

    `model`: under a plan, also one that cannot be made dense again. `plan`: of the same rules.

    Raises:
        PlanError: the model is under another plan, or none.
    """
    attachment: _Attachment | None = getattr(model, "_moacompress", None)
    if attachment is None or attachment.plan.key() != plan.key():
        raise PlanError("the model is not under this plan, so it cannot take its notes")
    attachment.plan = plan
    model.config.quantization_config = MoaCompressConfig(plan=plan, weights=weight_types(model))


def install(model: PreTrainedModel, plan: Plan) -> None:
    """Puts hooks, refusals and the attention implementation of a plan on a model whose config is its own.

    Raises:
        PlanError: the plan is for a model of another shape.
    """
    modules, limit = _fitting_modules(model, plan), limit_in_environment(model)
    drop_projections(model, plan)
    put_gates(modules, plan, model_inputs(model), model.dtype, empty=True)
    _put(model, plan, modules, None, limit)


def _fitting_modules(model: PreTrainedModel, plan: Plan) -> list[torch.nn.Module]:
    """Returns the attention modules that a plan's layers are for; refuses a plan that is for another model."""
    plan.check_model(config_shape(model.config, dtype=plan.model.dtype), weights=False)
    check_formats(plan.formats)
    modules = attention_modules(model)
    if len(modules) != plan.model.layers:
        raise PlanError(f"the plan has {plan.model.layers} layers, the model has attention in {len(modules)}")
    return modules


def model_inputs(model: PreTrainedModel) -> int:
    """Returns how many numbers of a token enter a layer, which gates see."""
    return int(model.config.get_text_config(decoder=True).hidden_size)


def _take_own_configs(model: PreTrainedModel) -> None:
    """Gives all modules of a model copies of their configs; what was one config, or a part of another, still is."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        for name, held in [*vars(module).items()]:
            if isinstance(held, PreTrainedConfig):
                setattr(module, name, copy.deepcopy(held, copies))


def _put(
    model: PreTrainedModel,
    plan: Plan,
    modules: list[torch.nn.Module],
    dropped: list[Dropped] | None,
    limit: int | None,
) -> None:
    attention.register()  # transformers may have been reloaded
    decoder = model.get_decoder() or model.base_model
    for part in model.modules():
        fuse(part)
    stack = Stack(read_layers) if are_fused(getattr(decoder, "layers", ())) else None
    hook = DecoderHook(plan, decoder, LayerOrder(decoder, modules), stack)
    handles = [decoder.register_forward_pre_hook(hook, with_kwargs=True)]
    layer_hooks = [AttentionHook(_context(plan, layer)) for layer in range(len(modules))]
    for module, layer_hook in zip(modules, layer_hooks, strict=True):
        handles.append(module.register_forward_pre_hook(layer_hook, with_kwargs=True))
    implementations = []
    for config in _configs_around(model, decoder):
        before = config._attn_implementation_internal
        if before in (None, NAME):  # loading a compressed checkpoint has set ours already
            before = "sdpa" if model._supports_sdpa else "eager"
        implementations.append((config, before))
        config._attn_implementation_internal = NAME
    for name, override in OVERRIDES.items():
        setattr(model, name, partial(override, model))  # a bound method cannot be pickled: it is looked up by its name
    head = model.get_output_embeddings()
    parts = [*decoder.modules(), *([head] if isinstance(head, torch.nn.Module) else [])]
    taken = [part for part in parts if install_kernel(part)]
    model.__dict__["_moacompress"] = _Attachment(
        plan, plan, hook, layer_hooks, handles, implementations, taken, dropped
    )
    if limit is not None:
        keep_prefixes(model, limit)


def shard_to_local_heads(model: PreTrainedModel) -> None:
    """Has a model under a plan attend by the part of it that is of the KV heads of this rank, once its weights are known.

    Raises:
        ModelError: its KV heads do not divide by the ranks of tensor parallelism, or it is not known which are here.
        PlanError: layers share attention.
    """
    attachment: _Attachment = model.__dict__["_moacompress"]
    plan, modules = attachment.plan, attention_modules(model)
    found = {own_heads(model, layer, module, plan.model.kv_heads) for layer, module in enumerate(modules)}
    if found == {None}:
        return
    if weight_types(model):
        raise UnsupportedError(
            "weights in blocks are not split over ranks; export with --weights dense, or load the model without tp_plan"
        )
    heads = next(each for each in found if each is not None)
    own = plan.of_heads(heads)
    if found != {heads}:
        raise UnsupportedError("some layers are split over ranks and others are not; load the model without tp_plan")
    attachment.own = own
    attachment.decoder_hook.set_plan(own)
    for layer, hook in enumerate(attachment.layer_hooks):
        hook.context, hook.heads = _context(own, layer), slice(heads.start, heads.stop)


def _configs_around(model: PreTrainedModel, decoder: torch.nn.Module) -> list[Any]:
    """Returns the configs of the decoder, of its parts, and of the models that it is a part of.

    Other parts, such as a tower that reads images, attend as they did.
    """
    inside = {id(module) for module in decoder.modules()}
    parts = [module for module in model.modules() if is_pretrained(module)]
    around = [part for part in parts if id(part) in inside or any(module is decoder for module in part.modules())]
    return [*{id(part.config): part.config for part in around}.values()]


def _context(plan: Plan, layer: int) -> LayerContext:
    native, serves = plan.model.native_windows[layer], bool(reuse_layers_of(plan.shares, layer))
    share, centre = plan.share(layer), plan.key_centre(layer)
    return LayerContext.of(layer, plan.rules[layer], plan.min_window, native, share, serves, centre)
