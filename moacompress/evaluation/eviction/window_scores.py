"""Scores by the attention of a prompt's last tokens: SnapKV, PyramidKV and AdaKV, which differ in how they share the bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moacompress.core.errors import UsageError
from moacompress.evaluation.eviction.allocation import best_of_all, best_of_each, even_counts, rounded_counts
from moacompress.evaluation.eviction.baseline import LayerReading, PromptBaseline, check_setting


def window_attention(reading: LayerReading, window: int) -> Tensor:
    """Returns the attention of the last tokens to all that are before them, `[kv_heads, n - window]`.

    It is the mean over the last `window` queries and over the query heads of a KV head's group.
    """
    key = reading.key
    n = key.shape[1]
    query = reading.grouped_query[:, :, n - window :]
    logits = query @ key[:, None].transpose(2, 3) * reading.scaling
    later = torch.ones(window, n, dtype=torch.bool, device=logits.device).triu(n - window + 1)
    return logits.masked_fill(later, -torch.inf).softmax(-1)[..., : n - window].mean((1, 2))


@dataclass(frozen=True)
class SnapKV(PromptBaseline):
    """SnapKV (arXiv 2404.14469): what the last tokens of the prompt attend to, smoothed over neighbours.

    The last tokens themselves are kept before any other, the newest first.

    Attributes:
        window: how many last tokens observe.
        kernel: over how many neighbours the attention is averaged, odd.
    """

    name = "snapkv"
    window: int = 64
    kernel: int = 5

    def __post_init__(self) -> None:
        check_setting("window", self.window, 1)
        check_setting("kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise UsageError(f"kernel is {self.kernel}, and must be odd")

    def layer_scores(self, reading: LayerReading, prepared: Any) -> Tensor:
        """Returns the smoothed attention, and more than 1 for the last tokens."""
        heads, n = reading.key.shape[:2]
        window = min(self.window, n)
        observers = 2 + torch.arange(window, device=reading.key.device).expand(heads, window) / window
        if window == n:
            return observers
        attention = window_attention(reading, window)
        smooth = functional.avg_pool1d(attention[:, None], self.kernel, stride=1, padding=self.kernel // 2)[:, 0]
        return torch.cat([smooth, observers], 1)


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """PyramidKV (arXiv 2406.02069): SnapKV's scores; lower layers keep more than higher ones, falling linearly.

    Every layer keeps the last tokens. Of what is left for others the last layer gets a `beta`-th of the mean, the first
    what brings the mean back. Where the first would get more than there are, it gets all and the last the rest of that.

    Attributes:
        beta: how much steeper than even.
    """

    name = "pyramidkv"
    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting("beta", self.beta, 1)

    def allocate(self, scores: Tensor, kv_bytes: int, token_bytes: int) -> Tensor:
        """Returns the mask; within a layer every KV head keeps as many."""
        layers, kv_heads, n = scores.shape
        total = min(kv_bytes // token_bytes, scores.numel())
        each = total / (layers * kv_heads)
        window = min(self.window, n, each)
        left = each - window
        first = min(2 * left - left / self.beta, n - window)
        step = 2 * (left - first) / (layers - 1) if layers > 1 else 0.0
        sizes = [kv_heads * (window + (first + step * layer if layers > 1 else left)) for layer in range(layers)]
        counts = torch.stack([even_counts(count, kv_heads) for count in rounded_counts(sizes, total)])
        return best_of_each(scores, counts)


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """Ada-KV (arXiv 2407.11550) with SnapKV's scores: the KV heads of a layer compete for its tokens.

    Attributes:
        safeguard: share of an even part that every KV head keeps of its own best in any case.
    """

    name = "adakv"
    safeguard: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting("safeguard", self.safeguard, 0, 1)

    def allocate(self, scores: Tensor, kv_bytes: int, token_bytes: int) -> Tensor:
        """Returns the mask; every layer keeps as many."""
        layers, kv_heads, _ = scores.shape
        counts = even_counts(min(kv_bytes // token_bytes, scores.numel()), layers).tolist()
        masks = []
        for layer, count in zip(scores, counts, strict=True):
            safe = best_of_each(layer, torch.tensor([int(self.safeguard * count / kv_heads)] * kv_heads))
            masks.append(best_of_all(layer.masked_fill(safe, torch.inf), count))
        return torch.stack(masks)
