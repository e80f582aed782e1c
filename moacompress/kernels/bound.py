"""What a backend has read once, to make many steps with: the rings of a layer's cache, or all layers of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from moacompress.core.arrays import Ints
from moacompress.kernels.arguments import AllocationShortfall, CacheState, Rotary, Scores


class BoundRing(ABC):
    """A layer's cache as a backend has read it, for steps on its device. It keeps the tensors as long as it lives."""

    @abstractmethod
    def step(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scores: Scores,
        gate_scores: torch.Tensor | None = None,
        taken: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Puts one more token of every row into the cache and attends to it, `[rows, 1, heads, value_dim]`; without gradients.

        The host waits for nothing, and nothing that is launched depends on the lengths of the rows. The token's query, key and
        value are `[rows, heads, 1, dim]`; `gate_scores` are its scores, int16 `[rows, kv_heads]`, None where no rule selects.
        `taken` is 1 where a row's token is real and 0 where it is padding, which is not put into the cache and sees what the
        row's last real token sees, int64 `[rows]`; None where all are real. Rows have a real token.
        """

    @abstractmethod
    def reuse(self, *, head_map: Ints, value_sets: Ints, value_formats: Ints) -> BoundReuse:
        """Reads what a layer that shares the attention has beside the blocks' own values; after a first step.

        Of each of its KV heads, int64 `[kv_heads]`: `head_map` is the KV head whose attention it has, `value_sets` says which
        of `RingState.shared_values` are its own, and `value_formats` is the code of their format.
        """


class BoundReuse(ABC):
    """A layer that shares the attention of one with a cache in rings."""

    @abstractmethod
    def step(self, value: torch.Tensor, *, scores: Scores) -> torch.Tensor:
        """Puts a token's values beside those of the shared layer's step, which has been made, and attends as that did.

        No key is read, and the host waits for nothing; without gradients. Values are `[rows, kv_heads, 1, value_dim]`, the
        result `[rows, 1, heads, value_dim]`. Learned logits are those of the query heads whose attention each of its own has.
        """


class BoundCaches(ABC):
    """The caches of all decoder layers as a backend has read them."""

    @abstractmethod
    def read_again(self, layer: int, state: CacheState) -> None:
        """Reads the cache of one layer, by its index, again: there is another tensor in the place of one."""

    @abstractmethod
    def step(
        self, hidden: torch.Tensor, rotary: Rotary, first: int
    ) -> tuple[torch.Tensor, int, AllocationShortfall | None]:
        """Runs the decoder layers from `first` on for one token of every row, `[rows, 1, hidden]`; it must not be traced.

        Returns:
            What came out of the last layer that was done, if any was; how many layers are done, those before `first` included;
            and what the next one lacks, None if these are all.

        Raises:
            WeightsMoved: a weight is not in the memory any more that it was read in; nothing is done.
        """


class BoundLayers(ABC):
    """All decoder layers as a backend has read them. It keeps their tensors as long as it lives."""

    @abstractmethod
    def read_caches(self, states: Sequence[CacheState | None]) -> BoundCaches:
        """Reads the caches of the layers, None of one that shares attention; all have one lag, and steps write to them."""


class WeightsMoved(Exception):
    """A weight is in another memory than it was read in."""
