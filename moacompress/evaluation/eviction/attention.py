"""The attention that a model runs with here: what a query sees is said by the cache that the layer has just written to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

from moacompress.calibration.profile.passes import attending_as
from moacompress.core.errors import ModelError

NAME = "moacompress_eviction"
"""Name of the attention among transformers' attention functions."""

MORE = 32
"""Tokens for which a cache makes room at a time."""

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""Returns what a layer's new tokens get, `[rows, heads, tokens, value_dim]`, by the layer's index, their queries
`[rows, heads, tokens, head_dim]`, the keys and values that the layer's cache has returned, and the factor on the scores."""
_attend: ContextVar[Attend] = ContextVar("moacompress_eviction_attend")


class WholeCache(DynamicCache):
    """Keeps and shows everything: the dense model. One row."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Adds the new tokens, and is what attends next."""
        _attend.set(self.attend)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attends to all tokens up to each query."""
        tokens, total = query.shape[2], key.shape[2]
        mask = None if tokens == total else causal(tokens, total, key.device)
        out: Tensor = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        return out


class KeptCache(WholeCache):
    """Shows of a prompt only what is kept of it, and everything after; a row for each way to keep.

    The prompt is stored once for all rows, its keys and values `[1, kv_heads, n, dim]` of each layer, and behind it what
    the rows have read: of each token, all rows. What is kept is bool `[rows, layers, kv_heads, n]`.
    """

    def __init__(self, kept: Tensor, keys: list[Tensor], values: list[Tensor]) -> None:
        super().__init__()
        self.kept, self._after = kept, [0] * len(keys)
        self._held = [list(pair) for pair in zip(keys, values, strict=True)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns how many tokens were read, those of the prompt with them."""
        return int(self.kept.shape[-1]) + self._after[layer_idx]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Adds the new tokens of every row, `[rows, kv_heads, tokens, head_dim]`, and is what attends next."""
        rows, _, tokens = key_states.shape[:3]
        first = self.kept.shape[-1] + rows * self._after[layer_idx]
        for which, states in enumerate((key_states, value_states)):
            held = self._held[layer_idx][which]
            if held.shape[2] < first + rows * tokens:
                held = functional.pad(held, (0, 0, 0, rows * (tokens + MORE)))
                self._held[layer_idx][which] = held
            held[0, :, first : first + rows * tokens] = states.permute(1, 2, 0, 3).flatten(1, 2)
        self._after[layer_idx] += tokens
        _attend.set(self.attend)
        return key_states, value_states

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attends to what is kept, and to later tokens of the row up to each query."""
        rows, tokens, after = len(query), query.shape[2], self._after[layer]
        shown = self.kept[:, layer].to(key.device).transpose(0, 1)  # [kv_heads, rows, n]
        own = torch.eye(rows, dtype=torch.bool, device=key.device)[:, None, None]
        later = (own & causal(tokens, after, key.device)[..., None]).flatten(2)  # [rows, tokens, after * rows]
        visible = torch.cat(
            (shown[:, :, None].expand(-1, -1, tokens, -1), later.expand(len(shown), -1, -1, -1)), -1
        )  # [kv_heads, rows, tokens, n + after * rows]
        # rows become tokens of one row, so that the prompt is not repeated: [1, heads, rows * tokens, head_dim]
        asked = query.transpose(0, 1).flatten(1, 2)[None]
        keys, values = (held[:, :, : visible.shape[-1]] for held in self._held[layer])
        out = masked_attention(asked, keys, values, scaling, visible.flatten(1, 2))
        in_rows: Tensor = out[0].unflatten(1, (rows, tokens)).transpose(0, 1)
        return in_rows


class SideBySide(WholeCache):
    """Rows of one batch that each attend by a cache of their own; all have read as many tokens.

    The parts are caches, in the order of the rows, each with how many rows it has.
    """

    def __init__(self, parts: Sequence[tuple[WholeCache, int]]) -> None:
        super().__init__()
        self.parts = [each for each, _ in parts]
        self._rows = [rows for _, rows in parts]
        self._held: list[tuple[Tensor, Tensor]] = []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns how many tokens were read."""
        return self.parts[0].get_seq_length(layer_idx)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Adds the new tokens of every row to its own cache, and is what attends next."""
        given = zip(self.parts, key_states.split(self._rows), value_states.split(self._rows), strict=True)
        self._held = [part.update(key, value, layer_idx, *args, **kwargs) for part, key, value in given]
        _attend.set(self.attend)
        return key_states, value_states

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attends from each row to what its cache shows."""
        asked = zip(self.parts, query.split(self._rows), self._held, strict=True)
        return torch.cat([part.attend(layer, each, *held, scaling) for part, each, held in asked])


def causal(tokens: int, total: int, device: torch.device) -> Tensor:
    """Returns which of `total` keys the last `tokens` queries may see, bool `[tokens, total]`."""
    return torch.ones(tokens, total, dtype=torch.bool, device=device).tril(total - tokens)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, visible: Tensor) -> Tensor:
    """Returns softmax attention under a mask, `[1, heads, tokens, value_dim]`.

    Queries are `[1, heads, tokens, head_dim]`, keys and values `[1, kv_heads, all, dim]`, the mask bool
    `[kv_heads or 1, tokens, all]`. The query heads of a group are put one after the other, so that their keys are not repeated.
    """
    kv_heads, tokens = key.shape[1], query.shape[2]
    grouped = query.unflatten(1, (kv_heads, -1)).flatten(2, 3)
    mask = visible.repeat(1, grouped.shape[2] // tokens, 1)[None]
    out: Tensor = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    ungrouped: Tensor = out.unflatten(2, (-1, tokens)).flatten(1, 2)
    return ungrouped


@contextmanager
def attending(model: PreTrainedModel, attend: Attend | None = None) -> Iterator[None]:
    """Lets a dense model attend as its caches say, and puts everything back.

    Args:
        model: the model.
        attend: attends in layers that are called without a cache.
    """
    token = None if attend is None else _attend.set(attend)
    try:
        with attending_as(model, NAME):
            yield
    finally:
        if token is not None:
            _attend.reset(token)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer."""
    if any(each is not None for each in (attention_mask, softcap, s_aux, kwargs.get("position_bias"))):
        raise ModelError(
            f"{type(module).__name__} attends with a softcap, sink logits, a mask or a bias of its own; known ways to evict "
            "are measured with plain causal attention"
        )
    layer: int = module.layer_idx  # type: ignore[assignment]
    factor = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return _attend.get()(layer, query, key, value, factor).transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask function beside `_attention`, which needs none: one row without padding."""


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _no_mask)
