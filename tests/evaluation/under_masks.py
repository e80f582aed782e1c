"""What the tests of known ways to evict share: their names, the sizes of the tiny model, and logits behind a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moacompress.evaluation.eviction.attention import attending
from moacompress.evaluation.eviction.baseline import PromptBaseline, StreamBaseline
from moacompress.evaluation.eviction.registry import EVICTIONS
from moacompress.runtime.compat.alternates import cache_argument

PROMPTED = [name for name, kind in EVICTIONS.items() if issubclass(kind, PromptBaseline)]
STREAMED = [name for name, kind in EVICTIONS.items() if issubclass(kind, StreamBaseline)]
LAYERS, KV_HEADS, DIM = 3, 2, 16


@torch.no_grad()
def logits_after(model: Any, ids: list[int], end: int, store: Any, steps: tuple[int, ...] = (7, 1, 1, 4)) -> Tensor:
    """Returns the logits of what is fed after `end`, a few tokens at a time."""
    found = []
    with attending(model):
        for size in (*steps, len(ids)):
            part = torch.tensor([ids[end : end + size]])
            if part.numel():
                found.append(model(input_ids=part, use_cache=True, **cache_argument(store)).logits[0])
            end += size
    return torch.cat(found)
