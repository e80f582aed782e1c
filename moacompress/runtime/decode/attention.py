"""The attention that transformers calls under the name `moacompress`."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from transformers import masking_utils, modeling_utils

from moacompress.core.errors import UnsupportedError
from moacompress.kernels.arguments import Scores
from moacompress.kernels.backend import prefill_alone
from moacompress.kernels.centred_keys import centred, logits_beside
from moacompress.kernels.derivatives import is_transformed
from moacompress.kernels.dispatch import backend_for
from moacompress.kernels.reference.codes import LARGEST, is_clipped
from moacompress.rules.formats import Integer, find_code
from moacompress.runtime import autocast
from moacompress.runtime.cache.layer_cache import PlanCacheLayer
from moacompress.runtime.cache.plan_cache import PlanCache
from moacompress.runtime.compat.masks import plan_mask
from moacompress.runtime.decode.context import CONTEXT, NAME, LayerCall, LayerContext
from moacompress.runtime.decode.routes import dispatch, straight_through
from moacompress.runtime.decode.step_requests import AttendRequest
from moacompress.runtime.sharing.shared_keys import SHARED_KEYS, SharedKeys, taken

logger = logging.getLogger(__name__)
_said: set[str] = set()
"""Where it was said that numbers are clipped; a process says it once."""
MASK_SHAPE = (
    "an attention mask of shape {} is not supported by a compressed model, whose plan is the mask; pass a 2-D one that says "
    "which tokens are real"
)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attends under the plan and, with a cache, commits the chunk.

    Args:
        module: the attention module.
        query: `[batch, heads, tokens, head_dim]`.
        key: `[batch, kv_heads, tokens, head_dim]`, of these tokens only.
        value: `[batch, kv_heads, tokens, value_dim]`.
        attention_mask: which tokens are real, bool `[batch, tokens]`, or None where all are; what a padded query gets is 0, but
            in the last column.
        scaling: factor on the scores, `head_dim ** -0.5` if None.
        dropout: must be 0.
        sliding_window: the layer's own window, checked against the plan's.
        softcap: bound of the scores by tanh.
        s_aux: learned sink logit of each query head, `[heads]`.
        is_causal: must not be False.
        **kwargs: holds the `LayerCall`, and what anchors have shared.

    Returns:
        `[batch, tokens, heads, value_dim]` and None: there are no attention weights to give.
    """
    call = kwargs.get(CONTEXT)
    if not isinstance(call, LayerCall):
        raise UnsupportedError(
            "the attention 'moacompress' was called on a model that has no plan; load a compressed checkpoint with "
            "from_pretrained, or use moacompress.attach(model, plan)"
        )
    context, shared_keys = call.context, kwargs.get(SHARED_KEYS)
    _refuse(module, context, key, attention_mask, dropout, sliding_window, is_causal)
    device = value.device
    query, key, value = autocast.as_computed(query, key, value)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if context.share is not None:
        query, key, s_aux = taken(shared_keys, context.layer, context.share)
        value = value.to(query.device)  # where the anchor's blocks are, if the layers are on two devices
        attention_mask = None if attention_mask is None else attention_mask.to(query.device)
    else:
        if (centre := context.centre_on(query.device)) is not None:
            key = _less_centre(call, key, centre, softcap)
            s_aux = None if s_aux is None else logits_beside(s_aux, query, centre, scaling)
        if context.serves and shared_keys is not None:
            shared_keys.put(context.layer, SharedKeys(query, key, s_aux))
    scores = Scores(scaling, softcap or 0.0, s_aux)
    tensors = (query, key, value, attention_mask)
    if not autocast.is_on(query):
        return _attended(call, *tensors, scores).to(device), None
    with torch.autocast(query.device.type, enabled=False):
        return _attended(call, *tensors, scores).to(device), None


def _less_centre(call: LayerCall, key: torch.Tensor, centre: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Returns keys less the layer's centre, and has the cache take these in: the one place for all that is attended by keys.

    Raises:
        UnsupportedError: the layer bounds its scores.
    """
    context = call.context
    if softcap:
        raise UnsupportedError(
            f"layer {context.layer} bounds its scores, and the plan has centres of its keys, which move all scores of a query; "
            "profile and search this model"
        )
    less = centred(key, centre)
    if call.cache is not None and not torch.compiler.is_compiling():
        cast(PlanCacheLayer, call.cache.layers[context.layer]).replace_keys(less)
    return less


def _attended(
    call: LayerCall,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scores: Scores,
) -> torch.Tensor:
    """Returns what `attention_forward` does; autocast is off."""
    context, cache, *of_gates = call
    tensors = (query, key, value, attention_mask)
    if not torch.compiler.is_compiling():
        _warn_of_clipped(context, key, value)
        return dispatch(AttendRequest(context, cache, *tensors, scores, *of_gates))
    if not (torch.is_grad_enabled() and query.requires_grad) and call.trained_scores is None:
        handle = None if cache is None else cache.handle
        out: torch.Tensor = torch.ops.moacompress.attend(
            *tensors, handle, context.rules.columns, context.layer, *scores, call.gate_scores
        )
        return out
    backend = backend_for(query)
    able = backend.capabilities
    traced = able.prefill_gradients and able.traced and not context.selects
    if cache is None and attention_mask is None and traced and not scores.by_query:
        chunk, rules = straight_through(context, query, key, value)
        whole = prefill_alone(backend, *chunk, rules=rules, scores=scores).to(query.dtype)
        return whole.transpose(1, 2).contiguous()
    between: torch.Tensor = _attend_between_graphs(context, cache, *tensors, scores, *of_gates)
    return between


def _warn_of_clipped(context: LayerContext, key: torch.Tensor, value: torch.Tensor) -> None:
    """Warns where a prompt's keys or values are beyond what codes hold, whose scales are float16, and are clipped.

    A single token is not looked at, nor anything on a GPU, where the host would wait for the answer.

    `key`: `[batch, kv_heads, tokens, head_dim]`. `value`: `[batch, kv_heads, tokens, value_dim]`.
    """
    if _said or context.formats is None or key.shape[2] < 2 or not key.numel():
        return
    if key.device.type != "cpu" or type(key) is not torch.Tensor or is_transformed():
        return
    for what, codes, vectors in zip(("keys", "values"), context.formats, (key, value), strict=True):
        low, high = vectors.detach().aminmax()
        if not max(-float(low), float(high)) * vectors.shape[-1] ** 0.5 > LARGEST:  # no rotation makes one beyond it
            continue
        for head, kind in enumerate(map(find_code, codes)):
            if isinstance(kind, Integer) and is_clipped(vectors[:, head].detach(), kind.bits):
                _said.add(what)
                logger.warning(
                    "%s of layer %d, KV head %d, are beyond what the scales of %s hold, float16 up to %.0f, and are clipped; "
                    "a plan without codes has them as they are (search with --formats native)",
                    what,
                    context.layer,
                    head,
                    kind.name,
                    LARGEST,
                )
                return


@torch.compiler.disable(reason="gradients through a cache or a mask")  # type: ignore[untyped-decorator]
def _attend_between_graphs(context: LayerContext, cache: PlanCache | None, *arguments: Any) -> torch.Tensor:
    """Attends where a compiled graph cannot hold it: the model around it is compiled."""
    request = AttendRequest(context, cache, *arguments)
    if cache is not None:
        cache.update(request.key, request.value, context.layer)
    return dispatch(request)


def _refuse(
    module: torch.nn.Module,
    context: LayerContext,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    sliding_window: int | None,
    is_causal: bool | None,
) -> None:
    if attention_mask is not None and attention_mask.ndim != 2:
        raise UnsupportedError(MASK_SHAPE.format(tuple(attention_mask.shape)))
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedError("is_causal=False is not supported: a plan is made for causal attention")
    if dropout:
        raise UnsupportedError(f"attention dropout ({dropout}) is not supported by a compressed model; set it to 0")
    if key.shape[1] != context.kv_heads:
        raise UnsupportedError(
            f"layer {context.layer} attends with {key.shape[1]} KV heads, the plan has {context.kv_heads}; under tensor "
            "parallelism put the plan on a model that is split over ranks already, each with KV heads of its own"
        )
    if sliding_window is not None and sliding_window != context.native_window:
        raise UnsupportedError(
            f"layer {context.layer} runs with a sliding window of {sliding_window}, the plan was made for "
            f"{context.native_window}"
        )


def register() -> None:
    """Makes the attention known to transformers, and again to a module of it that was reloaded."""
    modeling_utils.AttentionInterface.register(NAME, attention_forward)
    masking_utils.AttentionMaskInterface.register(NAME, plan_mask)
