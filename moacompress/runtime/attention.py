"""The attention that transformers calls under the name `moacompress`, and its mask function, which only refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from moacompress.errors import UnsupportedError
from moacompress.kernels.reference import Keys, sparse_attention
from moacompress.plan import Rule
from moacompress.runtime.cache import PlanCacheLayer

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
        attention_mask: must be None: the plan is the mask.
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
    _refuse(module, context, key, attention_mask, dropout, sliding_window, is_causal)
    batch, heads, tokens, head_dim = query.shape
    group = heads // context.kv_heads
    scale = scaling if scaling is not None else head_dim**-0.5
    grouped = query.view(batch, context.kv_heads, group, tokens, head_dim)
    sinks = None if s_aux is None else s_aux.view(context.kv_heads, group)
    cache = context.cache
    past = cache.tokens if cache is not None else 0
    if cache is not None:
        cache.take_pending()
    out = value.new_empty(batch, context.kv_heads, group, tokens, value.shape[-1])
    for index, (rule, members) in enumerate(context.groups):
        pick = _picker(members, context.kv_heads)
        k, v = pick(key, 1), pick(value, 1)
        if cache is None:
            keys = Keys(k, v, [(0, tokens)])
        elif tokens == 1:
            cache.stores[index].commit(k, v, past)
            keys = cache.stores[index].committed(past + 1)
        else:
            keys = cache.stores[index].with_chunk(k, v, past)
        result = sparse_attention(
            pick(grouped, 1),
            keys,
            past + tokens,
            rule,
            context.min_window,
            context.native_window,
            scale,
            softcap,
            None if sinks is None else pick(sinks, 0),
        )
        if cache is not None and tokens > 1:
            cache.stores[index].commit(k, v, past)
        if len(members) == context.kv_heads:
            out = result
        else:
            out[:, list(members)] = result
    if cache is not None:
        cache.advance(tokens)
    return out.reshape(batch, heads, tokens, -1).transpose(1, 2).contiguous(), None


def no_mask(
    *,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    **kwargs: Any,
) -> None:
    """Takes transformers' request for a mask; the plan is the mask, so all but the stock ones are refused.

    Raises:
        UnsupportedError: padding, packed sequences, bidirectional or overlaid masks.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UnsupportedError(UNEQUAL_LENGTHS)
    if use_vmap or not _is_stock(mask_function, local_size):
        raise UnsupportedError(
            "only the stock causal and sliding-window masks are supported; the model or the caller asks for another one "
            "(packed sequences, bidirectional attention, or an overlay)"
        )


UNEQUAL_LENGTHS = (
    "rows of unequal length (a mask with zeros) are not supported by a compressed model; run prompts of equal length "
    "together, or one at a time"
)


def _is_stock(mask_function: Callable[..., Any], local_size: int | None) -> bool:
    if mask_function is causal_mask_function:
        return True
    # transformers composes a sliding mask as and_masks(window overlay, causal): a closure over just these two
    parts = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    functions = parts[0] if len(parts) == 1 and isinstance(parts[0], tuple) else ()
    overlay = getattr(functions[0], "__qualname__", "") if functions else ""
    return (
        local_size is not None
        and len(functions) == 2
        and overlay.startswith("sliding_window_overlay")
        and functions[1] is causal_mask_function
    )


def _refuse(
    module: torch.nn.Module,
    context: LayerContext,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    sliding_window: int | None,
    is_causal: bool | None,
) -> None:
    if attention_mask is not None:
        raise UnsupportedError(
            "a ready-made attention mask is not supported by a compressed model; pass a 2-D one of ones"
        )
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


def register() -> None:
    """Makes the attention and its mask function known to transformers."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, no_mask)
