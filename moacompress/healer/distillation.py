"""Losses of the healed model against the dense one, at the targets of one sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def soft_loss(logits: Tensor, dense: Tensor) -> Tensor:
    """Returns KL(dense || model) in nats, mean over rows.

    Args:
        logits: of the model, `[rows, vocabulary]`.
        dense: of the dense model, likewise.
    """
    q, p = logits.float().log_softmax(-1), dense.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def hard_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy of the sample's own tokens in nats, mean over rows.

    Args:
        logits: of the model, `[rows, vocabulary]`.
        labels: int64 `[rows]`.
    """
    return functional.cross_entropy(logits.float(), labels)


def hidden_loss(states: Sequence[Tensor], dense: Sequence[Tensor]) -> Tensor:
    """Returns the mean squared error of the states of layers, each as a share of the dense states' mean square.

    The share keeps layers whose states are large from being all that counts.

    Args:
        states: what the layers of the model give, `[1, N, hidden]` each.
        dense: the same of the dense model.
    """
    shares = [
        (ours.float() - theirs.float()).square().mean() / theirs.float().square().mean().clamp_min(1e-12)
        for ours, theirs in zip(states, dense, strict=True)
    ]
    return torch.stack(shares).mean()
