"""Ways that evict token by token, while they read and while they answer: StreamingLLM and H2O."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moacompress.evaluation.eviction.baseline import StreamBaseline, check_setting


@dataclass(frozen=True)
class StreamingLLM(StreamBaseline):
    """StreamingLLM (arXiv 2309.17453): the first tokens and the newest, for every KV head.

    Tokens keep the positions that they have in the prompt; the paper counts them within the cache, which matters beyond
    the length that a model was trained for.

    Attributes:
        sinks: first tokens that are always kept.
    """

    name = "streaming-llm"
    by_position = True
    sinks: int = 4

    def __post_init__(self) -> None:
        check_setting("sinks", self.sinks, 0)

    def scores(self, positions: Tensor, received: Tensor, now: int, room: Tensor) -> Tensor:
        """Returns the position, and infinity for the first tokens as far as there is room for more than them."""
        kept = positions < torch.clamp(room - 1, max=self.sinks)[:, None]
        return positions.double().masked_fill(kept, torch.inf)


@dataclass(frozen=True)
class H2O(StreamBaseline):
    """H2O (arXiv 2306.14048): one part for the newest tokens, the other for those that got the most attention so far.

    Attributes:
        recent: the part of the newest.
    """

    name = "h2o"
    recent: float = 0.5

    def __post_init__(self) -> None:
        check_setting("recent", self.recent, 0, 1)

    def scores(self, positions: Tensor, received: Tensor, now: int, room: Tensor) -> Tensor:
        """Returns the attention that each token got, and infinity for the newest."""
        newest = torch.clamp((room * self.recent).long(), min=1)[:, None]
        return received.double().masked_fill(positions > now - newest, torch.inf)
