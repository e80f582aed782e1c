"""The attention that transformers calls under the name `moacompress`."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AttentionInterface

from moacompress.core.arrays import Ints
from moacompress.core.errors import UnsupportedError
from moacompress.kernels import dispatch
from moacompress.kernels.reference import Keys, sparse_attention
from moacompress.rules.rule import Rule
from moacompress.runtime import masks
from moacompress.runtime.block_runs import rule_groups
from moacompress.runtime.cache import PlanCache
from moacompress.runtime.layer import PlanCacheLayer
from moacompress.runtime.real_tokens import Bools, Chunk, Group

NAME = "moacompress"
"""Name of the attention implementation; it must not contain "flash", "sdpa" or "flex_attention"."""
CONTEXT = "moacompress_context"
"""Keyword under which a `LayerCall` reaches the attention."""
_contexts: weakref.WeakValueDictionary[int, LayerContext] = weakref.WeakValueDictionary()
_numbers = itertools.count()


@dataclass(frozen=True)
class LayerContext:
    """What the attention of one layer needs to know of the plan.

    Attributes:
        layer: index of the layer.
        groups: KV heads that share a rule, with that rule.
        kv_heads: KV heads of the layer.
        min_window: the plan's smallest window, tokens.
        native_window: the layer's own sliding window in tokens, or None.
        columns: sink, alpha and beta_q of every KV head, each int64 `[kv_heads]`.
        number: names it in a compiled model, whose graph holds no such objects; see `find`. In another process it names another
            one or none, so every copy, unpickled ones too, has a number of its own.
    """

    layer: int
    groups: tuple[tuple[Rule, tuple[int, ...]], ...]
    kv_heads: int
    min_window: int
    native_window: int | None
    columns: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    number: int = field(default_factory=lambda: next(_numbers))

    def __post_init__(self) -> None:
        _contexts[self.number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        rules = tuple(Rule(*numbers) for numbers in zip(*(column.tolist() for column in self.columns), strict=True))
        return LayerContext.of, (self.layer, rules, self.min_window, self.native_window)

    @staticmethod
    def find(number: int) -> LayerContext:
        """Returns the context of a number."""
        return _contexts[number]

    @staticmethod
    def of(layer: int, rules: Sequence[Rule], min_window: int, native_window: int | None) -> LayerContext:
        """Returns the context of a layer with these rules."""
        # on the CPU also where transformers builds the model on another device, or on none
        numbers = [(rule.sink, rule.alpha, rule.beta_q) for rule in rules]
        table = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        sink, alpha, beta_q = table.T.contiguous().unbind(0)
        columns = (sink, alpha, beta_q)
        return LayerContext(layer, rule_groups(rules), len(rules), min_window, native_window, columns)


class LayerCall(NamedTuple):
    """What the hook of a layer hands to its attention: the context, and the model's cache or None."""

    context: LayerContext
    cache: PlanCache | None


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
        **kwargs: holds the `LayerCall`.

    Returns:
        `[batch, tokens, heads, value_dim]` and None: there are no attention weights to give.
    """
    call = kwargs.get(CONTEXT)
    if not isinstance(call, LayerCall):
        raise UnsupportedError(
            "the attention 'moacompress' was called on a model that has no plan; load a compressed checkpoint with "
            "from_pretrained, or use moacompress.attach(model, plan)"
        )
    context, cache = call
    _refuse(module, context, key, attention_mask, dropout, sliding_window, is_causal)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    tensors = (query, key, value, attention_mask)
    if not torch.compiler.is_compiling():
        return attend(context, cache, *tensors, scale, softcap, s_aux), None
    if not (torch.is_grad_enabled() and query.requires_grad):
        handle = None if cache is None else cache.handle
        return torch.ops.moacompress.attend(*tensors, handle, context.number, scale, softcap or 0.0, s_aux), None
    if cache is None and attention_mask is None and dispatch.kernel_for(query) != "reference":
        rules = (*context.columns, context.min_window, context.native_window or 0, scale, softcap or 0.0, s_aux)
        out, _ = dispatch.prefill_alone(query, key, value, *rules)
        return out.transpose(1, 2).contiguous(), None
    return _attend_around(context, cache, *tensors, scale, softcap, s_aux), None


def attend(
    context: LayerContext,
    whole: PlanCache | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """Attends and commits; arguments and result as of `attention_forward`, which checks them, with the model's cache."""
    batch, _, tokens, _ = query.shape
    cache, chunk = None if whole is None else whole.layers[context.layer], Chunk.of(attention_mask, tokens)
    if cache is not None and tokens == 1 and chunk.real is None and not query.requires_grad:
        stepped = cache.step(query, scale, softcap or 0.0, s_aux)
        if stepped is not None:
            return stepped
    past = np.zeros(batch, np.int64) if cache is None else cache.lengths
    step = _Step(context, cache, chunk, past, query, key, value, scale, softcap, s_aux)
    way = _grouped if not tokens or _needs_reference(query, cache, past) else _compiled
    single = cache is not None and tokens == 1  # then what is evicted is not seen any more, and can make room first
    if cache is not None and single:
        cache.commit(chunk)
    out = way(step)
    if cache is not None and not single:
        cache.commit(chunk)
    if chunk.real is not None and not chunk.real[:, -1].all():
        out = _with_padded_ends(step, chunk.real, out)
    return out.transpose(1, 2).contiguous()


@torch.compiler.disable(reason="gradients through a cache or a mask")  # type: ignore[untyped-decorator]
def _attend_around(*arguments: Any) -> torch.Tensor:
    """`attend` where a compiled model cannot hold it whole: the model around it is compiled."""
    return attend(*arguments)


@dataclass(frozen=True)
class _Step:
    """One layer's part of a forward.

    Attributes:
        context: the layer's.
        cache: the layer's cache, or None.
        chunk: which tokens are real.
        past: tokens of every row before the chunk, `[batch]`.
        query: `[batch, heads, tokens, head_dim]`.
        key: `[batch, kv_heads, tokens, head_dim]`.
        value: `[batch, kv_heads, tokens, value_dim]`.
        scale: factor on the scores.
        softcap: bound of the scores by tanh.
        s_aux: learned sink logits, `[heads]`.
    """

    context: LayerContext
    cache: PlanCacheLayer | None
    chunk: Chunk
    past: Ints
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    softcap: float | None
    s_aux: torch.Tensor | None

    @property
    def grouped_query(self) -> torch.Tensor:
        """The query heads by KV head, `[batch, kv_heads, group, tokens, head_dim]`."""
        batch, heads, tokens, head_dim = self.query.shape
        return self.query.view(batch, self.context.kv_heads, heads // self.context.kv_heads, tokens, head_dim)


def _needs_reference(query: torch.Tensor, cache: PlanCacheLayer | None, past: Ints) -> bool:
    """Whether the compiled kernels cannot do this: another dtype or device, or gradients through what is in a cache."""
    if dispatch.kernel_for(query) == "reference":
        return True
    return cache is not None and query.requires_grad and (query.shape[2] == 1 or bool(past.any()))


def _compiled(step: _Step) -> torch.Tensor:
    """Attends by the compiled kernels, all rows and heads in one call.

    A chunk of one token is in its cache already, any other is not.

    Returns:
        `[batch, heads, tokens, value_dim]`, 0 for padding.
    """
    context, chunk, past = step.context, step.chunk, step.past
    bounds = (context.min_window, context.native_window or 0, step.scale, step.softcap or 0.0)
    rules: tuple[Any, ...] = (*context.columns, *bounds, step.s_aux)
    cache, counts = step.cache, chunk.counts(len(past))
    if cache is not None and chunk.columns == 1:
        lengths = torch.from_numpy(np.where(counts > 0, past + counts, 0))
        out, _ = dispatch.decode(step.query[:, :, 0], *cache.blocks_of_rows(), lengths, *rules)
        return out[:, :, None]
    before, valid = torch.from_numpy(past), torch.from_numpy(counts)
    held = cache.blocks_of_rows() if cache is not None and past.any() else _no_blocks(step.key)
    if chunk.real is None:
        out, _ = dispatch.prefill(step.query, step.key, step.value, *held, before, valid, *rules)
        return out
    order = torch.from_numpy(chunk.order)[:, None, :, None]
    query, key, value = (t.gather(2, order.expand_as(t)) for t in (step.query, step.key, step.value))
    out, _ = dispatch.prefill(query, key, value, *held, before, valid, *rules)
    return torch.zeros_like(out).scatter(2, order.expand_as(out), out)


def _no_blocks(key: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    return [], [], torch.empty((*key.shape[:2], 0), dtype=torch.int32)


def _grouped(step: _Step) -> torch.Tensor:
    """Attends in plain PyTorch, rows of equal length and KV heads of equal rules together; otherwise as `_compiled`."""
    query, value = step.grouped_query, step.value
    out = value.new_zeros(*query.shape[:-1], value.shape[-1])
    for group in step.chunk.groups(step.past):
        rows = (group.take(query), group.take(step.key), group.take(value))
        out = group.put(out, _attend(step, group, *rows, committed=step.chunk.columns == 1))
    return out.view(*step.query.shape[:-1], -1)


def _with_padded_ends(step: _Step, real: Bools, out: torch.Tensor) -> torch.Tensor:
    """Returns `out` with attention for the last column of rows that end in padding.

    `generate` goes on from the last column, whatever it holds. As in the dense model a padded query sees what is real before
    it: what the row's last real token sees.

    Args:
        step: its chunk is in the cache already.
        real: which tokens of the chunk are, `[batch, tokens]`.
        out: `[batch, heads, tokens, value_dim]`.
    """
    lengths = step.past + step.chunk.counts(len(step.past))
    ends = np.flatnonzero(~real[:, -1] & (lengths > 0))
    query, column = step.grouped_query[:, :, :, -1:], out[:, :, -1]
    for n in np.unique(lengths[ends]).tolist():
        rows = ends[lengths[ends] == n]
        at = torch.from_numpy(rows).to(out.device)
        cached = step.cache is not None
        group = Group(rows, n, 0, None) if cached else Group(rows, 0, n, step.chunk.order[rows, :n])
        held = (group.take(step.key), group.take(step.value))
        result = _attend(step, group, query.index_select(0, at), *held, committed=True)
        column = column.index_copy(0, at, result.reshape(len(rows), -1, result.shape[-1]))
    return torch.cat((out[:, :, :-1], column[:, :, None]), 2)


def _attend(
    step: _Step, group: Group, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, committed: bool
) -> torch.Tensor:
    """Attends for rows that have as many tokens each.

    Args:
        step: what they are part of.
        group: the rows.
        query: `[rows, kv_heads, group, tokens, head_dim]`.
        key: `[rows, kv_heads, tokens, head_dim]`, of the chunk.
        value: `[rows, kv_heads, tokens, value_dim]`.
        committed: the chunk is in the cache already, if there is one.

    Returns:
        `[rows, kv_heads, group, tokens, value_dim]`.
    """
    context = step.context
    sinks = None if step.s_aux is None else step.s_aux.view(context.kv_heads, -1)
    out = value.new_empty(*query.shape[:-1], value.shape[-1])
    for rule, members in context.groups:
        pick = _picker(members, context.kv_heads)
        k, v = pick(key, 1), pick(value, 1)
        if step.cache is None:
            keys = Keys(k, v, [(0, group.tokens)])
        elif committed:
            keys = step.cache.committed(group, members)
        else:
            keys = step.cache.with_chunk(group, members, k, v)
        result = sparse_attention(
            pick(query, 1),
            keys,
            group.past + group.tokens,
            rule,
            context.min_window,
            context.native_window,
            step.scale,
            step.softcap,
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
