"""What gates score: linear probes of what enters an attention layer, as integers that are compared and kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn

UNIT = 256
"""Scores are kept in 1/256: a gate's have a variance of 1, and what another matrix product makes of the last bits is less."""
_LIMIT = (1 << 15) - 1


def scored(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns `weight . hidden + bias` in float32, `[..., kv_heads]`, of what enters the layer's attention, `[..., inputs]`."""
    return nn.functional.linear(hidden.float(), weight.float(), bias.float())


def rounded_scores(scores: Tensor) -> Tensor:
    """Returns scores as they are compared and kept, int16 in 1/256; what is not a number is the least."""
    return scores.mul(UNIT).round_().nan_to_num_(nan=-_LIMIT).clamp_(-_LIMIT, _LIMIT).to(torch.int16)
