"""Scores from keys alone, or from what queries will be: KeyDiff and Expected Attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moacompress.evaluation.eviction.baseline import LayerReading, PromptBaseline, check_setting


@dataclass(frozen=True)
class KeyDiff(PromptBaseline):
    """KeyDiff (arXiv 2504.15364): keys that point elsewhere than the mean of all, each at unit length, are kept."""

    name = "keydiff"

    def layer_scores(self, reading: LayerReading, prepared: Any) -> Tensor:
        """Returns the negative cosine with the mean key."""
        key = reading.key
        mean = functional.normalize(key, dim=-1).mean(1, keepdim=True)
        return -functional.cosine_similarity(key, mean, dim=-1)


@dataclass(frozen=True)
class ExpectedAttention(PromptBaseline):
    """Expected Attention (arXiv 2510.00636): the attention that queries yet to come will give, were they normal.

    Mean and covariance are those of the prompt's queries behind the sinks, turned by the mean rotation of the next positions.
    With a query `q ~ N(m, C)`, `E exp(s k.q) = exp(s k.m + s^2 k.C k / 2)`. Over the tokens behind the sinks that is normalised
    to a sum of 1, averaged over the query heads of a group, and multiplied by the norm of the token's value.

    Attributes:
        future: how many next positions.
        sinks: first tokens that are always kept, and left out of all means.
        covariance: whether `C` counts.
        epsilon: what is added before the norm is multiplied with.
    """

    name = "expected-attention"
    future: int = 512
    sinks: int = 4
    covariance: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        check_setting("future", self.future, 1)
        check_setting("sinks", self.sinks, 0)
        check_setting("epsilon", self.epsilon, 0)

    def layer_scores(self, reading: LayerReading, prepared: Any) -> Tensor:
        """Returns the expected attention times the norm of the value; the sinks get infinity."""
        key, value = reading.key, reading.value
        kv_heads, n = key.shape[:2]
        if n <= self.sinks + 1:
            return key.new_full((kv_heads, n), torch.inf)
        cos, sin = later_rotations(reading.cos, reading.sin, self.future)
        query = reading.query_as_at(cos.mean(0), sin.mean(0))[:, self.sinks :].unflatten(0, (kv_heads, -1))
        key, value = key[:, self.sinks :], value[:, self.sinks :]
        mean = query.mean(2, keepdim=True)
        logits = (mean @ key[:, None].transpose(2, 3))[:, :, 0] * reading.scaling
        if self.covariance:
            apart = query - mean
            covariance = apart.transpose(2, 3) @ apart / apart.shape[2]
            turned = key[:, None] @ covariance
            logits = logits + (turned * key[:, None]).sum(-1) * (reading.scaling**2 / 2)
        expected = logits.softmax(-1).mean(1)
        scores = (expected + self.epsilon) * value.norm(dim=-1)
        return functional.pad(scores, (self.sinks, 0), value=torch.inf)


def later_rotations(cos: Tensor, sin: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the cosines and sines of the next positions, `[count, rotated numbers]` each, by adding up angles.

    Cosines and sines are those of the positions from 0 on, `[n, rotated numbers]`, all times one factor. Numbers of 16 bits say
    an angle to some thousandths only; over many positions it is known that much better.
    """
    scale = cos[:1].double()  # the cosine of 0, times the factor
    turn = torch.complex(cos.double(), sin.double()) / scale
    angle, at = turn[min(1, len(turn) - 1)].angle(), 1
    while 2 * at < len(turn):  # what an angle of so many positions is beside twice that of half of them
        at *= 2
        angle = angle + (turn[at] * torch.polar(torch.ones_like(angle), -angle * at)).angle() / at
    behind = torch.arange(1, count + 1, dtype=torch.float64, device=angle.device)[:, None]
    steps = torch.polar(torch.ones_like(behind * angle), behind * angle)
    known = turn[1 : count + 1]
    steps[: len(known)] = known
    later = turn[-1:] * steps * scale
    return later.real.to(cos.dtype), later.imag.to(cos.dtype)
