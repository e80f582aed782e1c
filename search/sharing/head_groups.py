"""KV heads that have one rule: an anchor's, and those of the copying layers whose values are kept beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from moacompress.core.arrays import Floats, Ints
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.share import LayerShares

Summed = TypeVar("Summed", Floats, Ints)


@dataclass(frozen=True, eq=False)
class HeadGroups:
    """The groups of a model whose layers share; a KV head that shares with none is a group of its own.

    A group has one rule, formats included: so far its reuse layers' values are kept in the format of the anchor's.

    Attributes:
        of_head: number of every KV head's group, int64 `[layers, kv_heads]`.
        size: groups.
    """

    of_head: Ints
    size: int

    @staticmethod
    def of(shape: ModelShape, shares: LayerShares) -> HeadGroups:
        """Returns the groups of copies; they are in the order of their anchors' KV heads."""
        of_head = np.zeros((shape.layers, shape.kv_heads), np.int64)
        size = 0
        for layer in range(shape.layers):
            share = shares[layer] if shares else None
            if share is not None:
                of_head[layer] = of_head[share.anchor, list(share.head_map)]
                continue
            of_head[layer] = np.arange(size, size + shape.kv_heads)
            size += shape.kv_heads
        return HeadGroups(of_head, size)

    def summed(self, table: Summed) -> Summed:
        """Returns sums over every group's KV heads, `[..., groups, last]`, of a table `[..., heads, last]` of all layers."""
        found = np.zeros((*table.shape[:-2], self.size, table.shape[-1]), table.dtype)
        np.add.at(np.moveaxis(found, -2, 0), self.of_head.reshape(-1), np.moveaxis(table, -2, 0))
        return found

    def any_of(self, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Returns what holds of any KV head of every group, `[groups, last]`, from `[..., last]` of all KV heads."""
        found: npt.NDArray[np.bool_] = self.summed(mask.reshape(-1, mask.shape[-1]).astype(np.int64)) > 0
        return found

    def spread(self, choice: Ints) -> Ints:
        """Returns the choice of every KV head, `[layers, kv_heads]`, from that of every group, `[groups]`."""
        return choice[self.of_head]

    def gathered(self, choice: Ints) -> Ints:
        """Returns the choice of every group, `[groups]`, from one of KV heads that is the same within groups."""
        found = np.zeros(self.size, np.int64)
        found[self.of_head.reshape(-1)] = choice.reshape(-1)
        return found
