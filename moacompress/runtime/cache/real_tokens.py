"""Which tokens of a forward are real: what a two-dimensional mask says of the tokens that are fed, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from moacompress.core.arrays import Bools, Ints

_ATTRIBUTE = "_moacompress_chunk"


@dataclass(frozen=True)
class Chunk:
    """The tokens of one forward.

    Attributes:
        columns: tokens fed to every row, padding included.
        real: which of them are real, bool `[batch, columns]`; None where all are.
    """

    columns: int
    real: Bools | None = None

    @staticmethod
    def of(mask: torch.Tensor | None, columns: int) -> Chunk:
        """Reads the mask that `masks.plan_mask` hands to the layers; what is read is kept with the tensor."""
        if mask is None:
            return Chunk(columns)
        known: Chunk | None = getattr(mask, _ATTRIBUTE, None)
        if known is None:
            real = mask.detach().cpu().numpy()
            known = Chunk(columns, None if real.all() else real)
            setattr(mask, _ATTRIBUTE, known)
        return known

    def counts(self, batch: int) -> Ints:
        """Returns the real tokens of every row, int64 `[batch]`."""
        return np.full(batch, self.columns, np.int64) if self.real is None else self._counts

    def of_rows(self, rows: Ints) -> Chunk:
        """Returns the chunk of some rows of the batch."""
        return self if self.real is None else Chunk(self.columns, self.real[rows])

    def part(self, columns: slice) -> Chunk:
        """Returns some of its columns as a chunk."""
        return Chunk(len(range(self.columns)[columns]), None if self.real is None else self.real[:, columns])

    def columns_of(self, rows: Any, numbers: Ints) -> Ints:
        """Returns the columns of real tokens.

        `rows`: of the batch, `[tokens]` or one. `numbers`: of the tokens among the real ones of their row, `[tokens]`.
        """
        return numbers if self.real is None else np.asarray(self.order[rows, numbers])

    @cached_property
    def order(self) -> Ints:
        """All columns of every row, the real ones first and in order, `[batch, columns]`; some must be padding."""
        assert self.real is not None
        return np.argsort(~self.real, axis=1, kind="stable")

    @cached_property
    def _counts(self) -> Ints:
        assert self.real is not None
        counts: Ints = self.real.sum(axis=1, dtype=np.int64)
        return counts
