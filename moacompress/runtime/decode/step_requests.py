"""What a forward asks for: attention of a layer, a whole decoder layer, or all of them.

A decoder layer that cannot be computed in one call is computed as norms, projections and a feed-forward around its attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch.nn.functional import linear, silu

from moacompress.kernels.arguments import LayerWeights, NormAndMlpWeights, Rotary, Scores
from moacompress.kernels.centred_keys import centred
from moacompress.kernels.dispatch import backend_for
from moacompress.kernels.weight_blocks import NATIVE, weight_type
from moacompress.runtime.cache.layer_cache import PlanCacheLayer
from moacompress.runtime.cache.plan_cache import PlanCache
from moacompress.runtime.cache.real_tokens import Chunk
from moacompress.runtime.cache.reuse_layer import ReuseCacheLayer
from moacompress.runtime.decode.context import LayerContext


@dataclass(frozen=True)
class AttendRequest:
    """One layer's attention of a chunk, which its cache then takes in.

    Attributes:
        context: the layer's part of the plan.
        whole: the model's cache, or None.
        query: `[batch, heads, tokens, head_dim]`.
        key: `[batch, kv_heads, tokens, head_dim]`, less its centre; the cache knows of it and of `value`.
        value: `[batch, kv_heads, tokens, value_dim]`.
        mask: which tokens are real, bool `[batch, tokens]`, or None where all are.
        scores: how scores are made; learned logits `[heads]`.
        gate_scores: of the tokens, int16 `[batch, kv_heads, tokens]`; None where no rule selects.
        trained_scores: see `LayerCall`.
    """

    context: LayerContext
    whole: PlanCache | None
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scores: Scores
    gate_scores: torch.Tensor | None = None
    trained_scores: torch.Tensor | None = None
    layers = 1

    @property
    def cache(self) -> PlanCacheLayer | ReuseCacheLayer | None:
        """The layer's cache."""
        return None if self.whole is None else self.whole.layers[self.context.layer]

    @property
    def tokens(self) -> int:
        """Tokens of the chunk, padding included."""
        return self.query.shape[2]

    @property
    def learns(self) -> bool:
        """Whether gradients are asked for: of what attends, or of what gates score."""
        given = (self.query, self.key, self.value, self.scores.sink_logits, self.trained_scores)
        return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given)

    @cached_property
    def chunk(self) -> Chunk:
        """Which of its tokens are real."""
        return Chunk.of(self.mask, self.tokens)


@dataclass(frozen=True)
class LayerRequest:
    """A whole decoder layer for one token a row.

    Attributes:
        context: the layer's part of the plan; it shares no attention with another.
        whole: the model's cache.
        hidden: the residual stream, `[rows, 1, hidden]`.
        rotary: of the token.
        scaling: factor on the scores.
        weights: the layer's.
    """

    context: LayerContext
    whole: PlanCache
    hidden: torch.Tensor
    rotary: Rotary
    scaling: float
    weights: LayerWeights
    layers = tokens = 1

    @property
    def cache(self) -> PlanCacheLayer:
        """The layer's cache."""
        return cast(PlanCacheLayer, self.whole.layers[self.context.layer])

    def attend_request(self) -> AttendRequest:
        """Returns the attention in it, of whose chunk the cache takes note."""
        (weights, biases, kinds, centre), norms_and_mlp, _ = self.weights
        normed = normalized(self.hidden, norms_and_mlp.norms[0], norms_and_mlp.eps)
        rows, head_dim = self.hidden.shape[0], self.rotary.cos.shape[-1]
        value_dim = weights[2].shape[0] // self.context.kv_heads
        query, key, value = (
            product(normed, weight, kind, bias).view(rows, 1, -1, dim).transpose(1, 2)
            for weight, kind, bias, dim in zip(
                weights, kinds or (NATIVE,) * 3, biases or (None,) * 3, (head_dim, head_dim, value_dim), strict=True
            )
        )
        query, key = rotated(query, self.rotary), centred(rotated(key, self.rotary), centre)
        self.whole.update(key, value, self.context.layer)
        return AttendRequest(self.context, self.whole, query, key, value, None, Scores(self.scaling))

    def finished(self, attended: torch.Tensor) -> torch.Tensor:
        """Returns the layer's output, `[rows, 1, hidden]`, from what attention gave, `[rows, 1, heads, value_dim]`."""
        return feed_forward(self.hidden, attended.flatten(2), self.weights.norms_and_mlp)


@dataclass(frozen=True)
class StackRequest:
    """All decoder layers for one token a row.

    Attributes:
        stack: knows how the layers were read; an `all_layers.Stack`.
        modules: the decoder layers.
        whole: the model's cache.
        hidden: what comes into the first, `[rows, 1, hidden]`.
        rotary: of the token, as the model hands it to its layers.
    """

    stack: Any
    modules: tuple[Any, ...]
    whole: PlanCache
    hidden: torch.Tensor
    rotary: Rotary
    tokens = 1

    @property
    def layers(self) -> int:
        """How many decoder layers it is for."""
        return len(self.modules)


Request = AttendRequest | LayerRequest | StackRequest


def feed_forward(hidden: torch.Tensor, attended: torch.Tensor, norms_and_mlp: NormAndMlpWeights) -> torch.Tensor:
    """Returns what a decoder layer makes of what attention gave.

    `hidden`: the residual stream, `[..., hidden]`. `attended`: `[..., heads * value_dim]`.
    """
    kinds = norms_and_mlp.kinds or (NATIVE,) * len(norms_and_mlp.weights)
    output, gate, up, last = zip(norms_and_mlp.weights, kinds, strict=True)
    hidden = hidden + product(attended, *output)
    normed = normalized(hidden, norms_and_mlp.norms[1], norms_and_mlp.eps)
    return hidden + product(silu(product(normed, *gate)) * product(normed, *up), *last)


def product(x: torch.Tensor, weight: torch.Tensor, kind: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the product with a weight of plain numbers or in blocks, `[..., outputs]`.

    `x`: `[..., inputs]`. `weight`: `[outputs, inputs]`, or uint8 `[outputs, bytes]`. `kind`: code of its type of blocks, or
    `weight_blocks.NATIVE`. `bias`: `[outputs]`, or None.
    """
    if kind == NATIVE:
        return linear(x, weight, bias)
    return backend_for(x).linear_blocks(x, weight, weight_type(kind), bias)


def normalized(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Returns the root mean square norm of `[..., hidden]`, in float32 up to its weight."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotated(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Returns rotated heads, `[rows, heads, tokens, head_dim]`; cosines and sines are `[rows or 1, tokens, head_dim]`."""
    low, high = x.chunk(2, dim=-1)
    return x * rotary.cos[:, None] + torch.cat((-high, low), dim=-1) * rotary.sin[:, None]
