"""Losses of the healed model against the dense one, at the targets of one sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def soft_loss(logits: Tensor, dense: Tensor) -> Tensor:
    """Returns KL(dense || model) of logits `[rows, vocabulary]` in nats, mean over rows."""
    q, p = logits.float().log_softmax(-1), dense.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def hard_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy of the sample's own tokens `[rows]` in nats, mean over rows of the logits."""
    return functional.cross_entropy(logits.float(), labels)


def hidden_loss(states: Sequence[Tensor], dense: Sequence[Tensor]) -> Tensor:
    """Returns the mean squared error of layers' states `[1, N, hidden]`, each as a share of the dense states' mean square.

    The share keeps layers whose states are large from being all that counts.
    """
    shares = [
        (ours.float() - theirs.float()).square().mean() / theirs.float().square().mean().clamp_min(1e-12)
        for ours, theirs in zip(states, dense, strict=True)
    ]
    return torch.stack(shares).mean()
