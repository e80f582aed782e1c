"""How bytes are shared among layers, KV heads and tokens: counts that add up exactly, and masks of the highest scores."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def even_counts(total: int, parts: int) -> Tensor:
    """Returns `total` in so many parts, which differ by at most one, the larger first: int64 `[parts]`."""
    share, rest = divmod(total, parts)
    return torch.tensor([share + 1] * rest + [share] * (parts - rest))


def rounded_counts(sizes: Sequence[float], total: int) -> list[int]:
    """Returns integers that add up to `total`, as the sizes do, each less than one away from its size (not negative)."""
    edges = torch.tensor(sizes, dtype=torch.float64).cumsum(0).add(1e-6).floor().long().tolist()
    return [after - before for before, after in pairwise([0, *edges[:-1], total])]


def best_of_each(scores: Tensor, counts: Tensor) -> Tensor:
    """Returns the mask of the highest scores of each row, `[..., n]`, so many as `counts`, `[...]`; of equals the first."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, ranks < counts.to(order.device)[..., None])


def best_of_all(scores: Tensor, count: int) -> Tensor:
    """Returns the mask of the `count` highest scores of all rows together; of equals the first."""
    return best_of_each(scores.flatten(), torch.tensor(count)).view_as(scores)
