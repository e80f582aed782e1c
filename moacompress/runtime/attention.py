"""The attention that transformers calls under the name `moacompress`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface

from moacompress.errors import UnsupportedError
from moacompress.kernels.reference import Keys, sparse_attention
from moacompress.plan import Rule
from moacompress.runtime import masks
from moacompress.runtime.chunk import Chunk, Group
from moacompress.runtime.layer import PlanCacheLayer

NAME = "moacompress"
"""Name of the attention implementation; it must not contain "flash", "sdpa" or "flex_attention"."""
CONTEXT = "moacompress_context"
"""Keyword under which a layer's context reaches the attention."""


@dataclass(frozen=True)
class LayerContext:
    """What the attention of one layer needs in one forward.

    Attributes:
        layer: index of the layer.
        groups: KV heads that share a rule, with that rule.
        kv_heads: KV heads of the layer.
        min_window: the plan's smallest window, tokens.
        native_window: the layer's own sliding window in tokens, or None.
        cache: the layer's cache, or None.
    """

    layer: int
    groups: tuple[tuple[Rule, tuple[int, ...]], ...]
    kv_heads: int
    min_window: int
    native_window: int | None
    cache: PlanCacheLayer | None = None


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
        attention_mask: which tokens are real, bool `[batch, tokens]`, or None where all are; what a padded query gets is 0.
        scaling: factor on the scores, `head_dim ** -0.5` if None.
        dropout: must be 0.
        sliding_window: the layer's own window, checked against the plan's.
        softcap: bound of the scores by tanh.
        s_aux: learned sink logit of each query head, `[heads]`.
        is_causal: must not be False.
        **kwargs: holds the `LayerContext`.

    Returns:
        `[batch, tokens, heads, value_dim]` and None: there are no attention weights to give.
    """
    context = kwargs.get(CONTEXT)
    if not isinstance(context, LayerContext):
        raise UnsupportedError(
            "the attention 'moacompress' was called on a model that has no plan; load a compressed checkpoint with "
            "from_pretrained, or use moacompress.attach(model, plan)"
        )
    batch, heads, tokens, head_dim = query.shape
    _refuse(module, context, key, attention_mask, dropout, sliding_window, is_causal)
    scale = scaling if scaling is not None else head_dim**-0.5
    grouped = query.view(batch, context.kv_heads, heads // context.kv_heads, tokens, head_dim)
    sinks = None if s_aux is None else s_aux.view(context.kv_heads, -1)
    cache, chunk = context.cache, Chunk.of(attention_mask, tokens)
    past = np.zeros(batch, np.int64) if cache is None else cache.lengths
    single = cache is not None and tokens == 1  # then what is evicted is not seen any more, and can make room first
    if cache is not None and single:
        cache.commit(chunk)
    out = value.new_zeros(*grouped.shape[:-1], value.shape[-1]) if chunk.real is not None else None
    for group in chunk.groups(past):
        chunk_keys, chunk_values = group.take(key), group.take(value)
        result = _attend(context, group, group.take(grouped), chunk_keys, chunk_values, single, scale, softcap, sinks)
        if group.rows is None and group.columns is None:
            out = result
        else:
            out = value.new_zeros(*grouped.shape[:-1], value.shape[-1]) if out is None else out
            out = group.put(out, result)
    if cache is not None and not single:
        cache.commit(chunk)
    if out is None:  # no tokens at all
        out = value.new_zeros(*grouped.shape[:-1], value.shape[-1])
    return out.reshape(batch, heads, tokens, -1).transpose(1, 2).contiguous(), None


def _attend(
    context: LayerContext,
    group: Group,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    committed: bool,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attends for rows that have as many tokens each.

    Args:
        context: the layer's.
        group: the rows.
        query: `[rows, kv_heads, group, tokens, head_dim]`.
        key: `[rows, kv_heads, tokens, head_dim]`, of these tokens only.
        value: `[rows, kv_heads, tokens, value_dim]`.
        committed: these tokens are in the cache already.
        scale: factor on the scores.
        softcap: bound of the scores by tanh.
        sinks: learned sink logits, `[kv_heads, group]`.

    Returns:
        `[rows, kv_heads, group, tokens, value_dim]`.
    """
    out = value.new_empty(*query.shape[:-1], value.shape[-1])
    for rule, members in context.groups:
        pick = _picker(members, context.kv_heads)
        k, v = pick(key, 1), pick(value, 1)
        if context.cache is None:
            keys = Keys(k, v, [(0, group.tokens)])
        elif committed:
            keys = context.cache.committed(group, members)
        else:
            keys = context.cache.with_chunk(group, members, k, v)
        result = sparse_attention(
            pick(query, 1),
            keys,
            group.past + group.tokens,
            rule,
            context.min_window,
            context.native_window,
            scale,
            softcap,
            None if sinks is None else pick(sinks, 0),
        )
        if len(members) == context.kv_heads:
            return result
        out[:, list(members)] = result
    return out


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
            f"layer {context.layer} attends with {key.shape[1]} KV heads, the plan has {context.kv_heads}; "
            "tensor parallelism is not supported"
        )
    if sliding_window is not None and sliding_window != context.native_window:
        raise UnsupportedError(
            f"layer {context.layer} runs with a sliding window of {sliding_window}, the plan was made for "
            f"{context.native_window}"
        )


def _picker(members: tuple[int, ...], kv_heads: int) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Returns a function that takes the KV heads `members` out of a dimension, without a copy where they are adjacent."""
    if len(members) == kv_heads:
        return lambda tensor, dim: tensor
    if members[-1] - members[0] + 1 == len(members):
        return lambda tensor, dim: tensor.narrow(dim, members[0], len(members))
    return lambda tensor, dim: tensor.index_select(dim, torch.tensor(members, device=tensor.device))


MASK_SHAPE = (
    "an attention mask of shape {} is not supported by a compressed model, whose plan is the mask; pass a 2-D one that says "
    "which tokens are real"
)


def register() -> None:
    """Makes the attention and its mask function known to transformers."""
    AttentionInterface.register(NAME, attention_forward)
    masks.register(NAME)
