"""Dense causal attention by PyTorch's own `scaled_dot_product_attention`, for passes on a GPU that need no probabilities.

What of a model it can compute is attention without a bound of the scores, a learned logit or a plan. Without a sliding window
the mask is `is_causal` and keys stay those of KV heads, which is what FlashAttention takes in bfloat16 and float16. Other
kernels of PyTorch take neither groups of heads with a mask nor, in float32, groups at all: keys are repeated for those.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from moacompress.kernels.arguments import Scores

HALVES = (torch.bfloat16, torch.float16)
"""Dtypes that FlashAttention computes in."""
DEVICES = ("cuda",)
"""Types of devices on which it is faster than the kernels here."""


def suits(query: torch.Tensor, scores: Scores) -> bool:
    """Returns whether attention of these queries is to be computed by it."""
    plain = not scores.softcap and scores.sink_logits is None
    return plain and query.device.type in DEVICES and query.dtype in (*HALVES, torch.float32)


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, native_window: int | None = None
) -> torch.Tensor:
    """Returns causal attention, `[rows, heads, tokens, value_dim]`, with gradients; `native_window` is in tokens."""
    tokens, group = query.shape[2], query.shape[1] // key.shape[1]
    mask = None
    if native_window is not None and native_window < tokens:
        at = torch.arange(tokens, device=query.device)
        mask = (at <= at[:, None]).logical_and_(at > at[:, None] - native_window)
    as_groups = mask is None and query.dtype in HALVES
    if group > 1 and not as_groups:
        key, value = (part.repeat_interleave(group, 1) for part in (key, value))
    return scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=as_groups and group > 1
    )


def dense_gradients(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    native_window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of query, key and value from that of `dense_attention`'s result."""
    with torch.enable_grad():
        leaves = [part.detach().requires_grad_() for part in (query, key, value)]
        out = dense_attention(leaves[0], leaves[1], leaves[2], scaling, native_window)
        found = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    return found[0], found[1], found[2]
