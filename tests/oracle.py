"""Attention by the words of the definitions: what kernels, routes and caches are held to.

Whole matrices in float64, one KV head at a time, and one query after the other for who sees whom. It shares nothing with the
product but its data, and the rounding of formats, which `tests/kernels/test_codes.py` holds to docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moacompress.kernels.reference.rounding import round_to
from moacompress.rules.formats import FORMATS
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule

NAME = "oracle"


def visible(
    rule: Rule, n: int, min_window: int, native: int | None = None, scores: Sequence[int] = (), first: int = 0
) -> Tensor:
    """Returns which keys the queries of a row see, bool `[n - first, n]`.

    Args:
        rule: of the KV head.
        n: tokens of the row.
        min_window: of the plan.
        native: the layer's own sliding window, or None.
        scores: of all tokens, where the rule's gate selects some.
        first: the first query.
    """
    mask, position = torch.zeros(n, n, dtype=torch.bool), torch.arange(n)
    selected: list[int] = []
    evicted = 0  # from the window, sinks aside
    for i in range(0 if rule.selects else first, n):
        window = min(i + 1, max(min_window, rule.alpha + rule.beta_q * (i + 1) // 1024))
        while rule.selects and rule.sink + evicted <= i - window:
            token, evicted = rule.sink + evicted, evicted + 1
            if len(selected) < min(evicted, rule.select_alpha + rule.select_beta_q * evicted // 1024):
                selected.append(token)
            elif selected:
                least = min(range(len(selected)), key=lambda place: (scores[selected[place]], place))
                if scores[token] > scores[selected[least]]:
                    selected[least] = token
        mask[i] = (position < rule.sink) | (position > i - window)
        mask[i, selected] = True
        if native:
            mask[i] &= position > i - native
        mask[i, i + 1 :] = False
    return mask[first:]


def kept(x: Tensor, format: str) -> Tensor:
    """Returns what queries attend to of keys or values in a format, of the dtype of `x`; gradients pass straight through."""
    bits = FORMATS[format].bits
    return x + (round_to(x.detach(), bits).to(x.dtype) - x.detach()) if bits else x


def weigh(
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the weights of one KV head's keys, float64 `[group, queries, keys]`, and the log of their denominator.

    A query is given the keys that it sees, and zeros for the rest.

    Args:
        query: `[group, queries, head_dim]`.
        key: `[keys, head_dim]`.
        mask: which keys a query sees, bool `[queries, keys]`.
        scaling: factor on the scores, `head_dim ** -0.5` where it is None.
        softcap: bound of the scores by tanh, if any.
        sink_logits: learned ones, `[group]`, if any.
    """
    keys = torch.where(mask[..., None], key.double(), 0)
    scores = torch.einsum("gqd,qkd->gqk", query.double(), keys) * (
        query.shape[-1] ** -0.5 if scaling is None else scaling
    )
    if softcap:
        scores = softcap * torch.tanh(scores.masked_fill(~mask, 0) / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sink_logits is not None:
        logits = sink_logits.double()[:, None, None].expand(*scores.shape[:2], 1)
        scores = torch.cat((scores, logits), -1)
    # the log of a sum with infinity is infinite to torch: here it is NaN, as the softmax is
    lse = scores.logsumexp(-1).masked_fill((scores == torch.inf).any(-1), torch.nan)
    return scores.softmax(-1)[..., : len(key)], lse


def attend_head(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *scores: Any) -> tuple[Tensor, Tensor]:
    """Returns attention of one KV head's queries, `[group, queries, value_dim]`, and the log of its denominator.

    Args:
        query: `[group, queries, head_dim]`.
        key: `[keys, head_dim]`.
        value: `[keys, value_dim]`; a query is given those that it sees, and zeros for the rest.
        mask: which keys a query sees, bool `[queries, keys]`.
        *scores: scaling, softcap and learned logits, as `weigh` takes them.
    """
    weights, lse = weigh(query, key, mask, *scores)
    return torch.einsum("gqk,qkv->gqv", weights, torch.where(mask[..., None], value.double(), 0)), lse


def attend(query: Tensor, key: Tensor, value: Tensor, masks: Tensor, *scores: Any) -> Tensor:
    """Returns attention of all rows, float64 `[rows, heads, queries, value_dim]`.

    Args:
        query: `[rows, heads, queries, head_dim]`.
        key: `[rows, kv_heads, keys, head_dim]`.
        value: `[rows, kv_heads, keys, value_dim]`.
        masks: bool `[queries, keys]`, or one of each KV head, or of each row and KV head.
        *scores: scaling, softcap and learned logits `[heads]`, as `weigh` takes them.
    """
    rows, kv_heads = key.shape[:2]
    group = query.shape[1] // kv_heads
    masks = masks.expand(rows, kv_heads, *masks.shape[-2:])
    *numbers, logits = (*scores, None, None, None)[:3]
    found = []
    for row in range(rows):
        for head in range(kv_heads):
            own = slice(head * group, (head + 1) * group)
            sinks = None if logits is None else logits[own]
            found.append(
                attend_head(query[row, own], key[row, head], value[row, head], masks[row, head], *numbers, sinks)[0]
            )
    return torch.cat(found).view(rows, query.shape[1], query.shape[2], -1)


def kept_by_head(x: Tensor, formats: Sequence[str]) -> Tensor:
    """Returns `kept` of keys or values `[rows, kv_heads, tokens, dim]`, in a format of each KV head."""
    return torch.stack([kept(x[:, head], format) for head, format in enumerate(formats)], 1)


def attend_under(
    rules: Sequence[Rule],
    min_window: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *scores: Any,
    native: int | None = None,
    gate_scores: Tensor | None = None,
) -> Tensor:
    """Returns attention of whole rows under a layer's rules, float64 `[rows, heads, tokens, value_dim]`.

    Args:
        rules: of the KV heads.
        min_window: of the plan.
        query: `[rows, heads, tokens, head_dim]`.
        key: `[rows, kv_heads, tokens, head_dim]`.
        value: `[rows, kv_heads, tokens, value_dim]`.
        *scores: as `attend` takes them.
        native: the layer's own sliding window, or None.
        gate_scores: of the gates, int16 `[rows, kv_heads, tokens]`, where there are any.
    """
    kv_heads, n = key.shape[1:3]
    numbers = [[()] * kv_heads] if gate_scores is None else gate_scores.tolist()
    masks = [
        torch.stack([visible(rule, n, min_window, native, of) for rule, of in zip(rules, row, strict=True)])
        for row in numbers
    ]
    keys = kept_by_head(key, [rule.key_format for rule in rules])
    values = kept_by_head(value, [rule.value_format for rule in rules])
    return attend(query, keys, values, torch.stack(masks), *scores)


@contextmanager
def attends_by(model: Any, attention: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Has every layer of a dense model attend by a function, as transformers calls one, without a mask."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    before = model.config._attn_implementation_internal
    model.config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        model.config._attn_implementation_internal = before


@contextmanager
def attending(model: Any, plan: Plan) -> Iterator[None]:
    """Has a dense model attend as a plan says, sharing and formats included, in forwards without a cache."""
    seen: dict[int, tuple[Any, Any, Any]] = {}

    def attention(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, softcap: Any = None, **rest: Any
    ) -> tuple[Tensor, None]:
        layer, sinks, group = module.layer_idx, rest.get("s_aux"), query.shape[1] // key.shape[1]
        rules, share, native = plan.rules[layer], plan.share(layer), plan.model.native_windows[layer]
        seen[layer] = query, key, sinks
        if share is not None:
            query, key, sinks = seen[share.anchor]
            heads = [head * group + number for head in share.head_map for number in range(group)]
            query, key = query[:, heads], key[:, list(share.head_map)]
            sinks = None if sinks is None else sinks[heads]
        out = attend_under(rules, plan.min_window, query, key, value, scaling, softcap, sinks, native=native)
        return out.transpose(1, 2).to(value.dtype).contiguous(), None

    with attends_by(model, attention):
        yield


def logits(model: Any, plan: Plan, ids: Tensor) -> Tensor:
    """Returns a dense model's logits as a plan says, without gradients, `[rows, tokens, vocabulary]`."""
    with attending(model, plan), torch.no_grad():
        found: Tensor = model(ids, use_cache=False).logits
    return found
