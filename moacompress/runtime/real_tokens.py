"""Which tokens of a forward are real: what a two-dimensional mask says of the tokens that are fed, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from moacompress.core.arrays import Ints

Bools: TypeAlias = npt.NDArray[np.bool_]

_ATTRIBUTE = "_moacompress_chunk"


@dataclass(frozen=True)
class Group:
    """Rows that have as many tokens before a forward, and as many real ones in it: they are attended to together.

    Attributes:
        rows: their numbers, or None for all rows of the batch.
        past: tokens before.
        tokens: real tokens in the forward.
        columns: where these are, `[rows, tokens]`, or None where all columns are real.
    """

    rows: Ints | None
    past: int
    tokens: int
    columns: Ints | None

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the rows' real tokens, in order: `[batch, ..., columns, dim]` becomes `[rows, ..., tokens, dim]`."""
        if self.rows is None and self.columns is None:
            return tensor
        if self.rows is not None:
            tensor = tensor.index_select(0, _index(self.rows, tensor.device))
        if self.columns is None:
            return tensor
        at = _index(self.columns, tensor.device)
        at = at.view(len(at), *[1] * (tensor.ndim - 3), self.tokens, 1).expand(*tensor.shape[:-2], -1, tensor.shape[-1])
        return tensor.gather(-2, at)

    def put(self, out: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Returns `out`, `[batch, ..., columns, dim]`, with the rows' real tokens from `result`, as `take` gives them."""
        if self.rows is None and self.columns is None:
            return result
        rows = _index(self.rows if self.rows is not None else np.arange(len(out)), out.device)
        if self.columns is None:
            return out.index_copy(0, rows, result)
        whole = out.index_select(0, rows)
        at = _index(self.columns, out.device)
        at = at.view(len(at), *[1] * (out.ndim - 3), self.tokens, 1).expand_as(result)
        return out.index_copy(0, rows, whole.scatter(-2, at, result))


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

    def where(self, row: int) -> Ints | None:
        """Returns the columns of a row's real tokens, in order; None where all are."""
        return None if self.real is None else self.order[row, : self._counts[row]]

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

    def groups(self, past: Ints) -> list[Group]:
        """Returns the rows by what they have before and in this forward; rows without real tokens are left out.

        Args:
            past: tokens of every row before it, `[batch]`.
        """
        counts = self.counts(len(past))
        if self.real is None and bool((past == past[0]).all()):
            return [Group(None, int(past[0]), self.columns, None)] if self.columns else []
        kinds = np.stack([past, counts], axis=1)
        found = []
        for before, tokens in np.unique(kinds, axis=0).tolist():
            if not tokens:
                continue
            rows = np.flatnonzero((past == before) & (counts == tokens))
            padded = self.real is not None and tokens < self.columns
            found.append(Group(rows, before, tokens, self.order[rows, :tokens] if padded else None))
        return found


def _index(numbers: Ints, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers, np.int64)).to(device)
