"""KL divergence between the predictions of two models: what plans, repairs and heals are judged by."""

from __future__ import annotations

import torch

MAX_DENSE_BYTES = 2 * 2**30
"""Dense logits kept in memory; beyond them they are computed again whenever a model is compared with the dense one."""


def kl_divergence(dense: torch.Tensor, other: torch.Tensor) -> float:
    """Returns KL(dense || other) in nats, mean over rows, of logits `[rows, vocabulary]`."""
    total = 0.0
    for p_row, q_row in zip(dense, other, strict=True):  # a row at a time: float64 of the whole would be large
        p, q = p_row.double().log_softmax(-1), q_row.double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    return max(total / len(dense), 0.0)
