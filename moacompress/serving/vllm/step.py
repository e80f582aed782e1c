"""A step's tokens in all classes, put together once for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from moacompress.rules.windows import BLOCK
from moacompress.serving.vllm.class_layers import ClassLayer, ClassMetadata


@dataclass
class Step:
    """A step's tokens in all classes, as the kernels take them.

    Attributes:
        spans: of each row its index, and first and end of its new tokens.
        chunks: those of rows with more than one.
        single: rows with one new token, int64 `[n]`.
        single_at: that token of each.
        past: tokens of each row before the step, int64 `[rows]`.
        lengths: tokens of each row, new ones included, int64 `[rows]`.
        tables: block ids of each class, `[rows, any]`.
        windows: those of the classes of windows, which come first, together, int32 `[classes, rows, width]`.
        slots: of the same classes, int64 `[tokens, classes]`.
    """

    spans: list[tuple[int, int, int]]
    chunks: list[tuple[int, int, int]]
    single: torch.Tensor
    single_at: torch.Tensor
    past: torch.Tensor
    lengths: torch.Tensor
    tables: list[npt.NDArray[np.int32]]
    windows: torch.Tensor
    slots: torch.Tensor

    @staticmethod
    def of(metadata: dict[str, ClassMetadata], classes: Sequence[ClassLayer]) -> Step:
        """Puts the metadata of the classes together."""
        found = [metadata[one.layer_name] for one in classes]
        of_windows = [one for one, of in zip(found, classes, strict=True) if not of.heads.selected]
        starts, lengths = found[0].starts.tolist(), found[0].lengths.to(torch.int64)
        spans = [(row, *span) for row, span in enumerate(pairwise(starts))]
        width = -(-int(lengths.max()) // BLOCK)
        single = [row for row, begin, end in spans if end - begin == 1]
        return Step(
            spans,
            [span for span in spans if span[2] - span[1] > 1],
            torch.tensor(single, dtype=torch.int64),
            torch.tensor([starts[row] for row in single], dtype=torch.int64),
            lengths - torch.tensor([end - begin for _, begin, end in spans]),
            lengths,
            [one.table.numpy() for one in found],
            torch.stack([one.table[:, :width] for one in of_windows]),
            torch.stack([one.slots for one in of_windows], 1).to(torch.int64),
        )

    def table_of(self, classes: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """Returns block ids of windows that count through the memory of KV heads, int32 `[rows, kv_heads, width]`.

        `classes` is that of each KV head, int64 `[kv_heads]`; `first`, int32 `[kv_heads]`, is added to its block ids.
        """
        return self.windows[classes].transpose(0, 1) + first[:, None]


class Steps:
    """The last step that was put together: all layers of a forward pass have the same."""

    def __init__(self) -> None:
        self._made_of: object = None
        self._step: Step | None = None

    def of(self, metadata: dict[str, ClassMetadata], classes: Sequence[ClassLayer]) -> Step:
        """See `Step.of`."""
        if self._step is None or self._made_of is not metadata:
            self._made_of, self._step = metadata, Step.of(metadata, classes)
        return self._step
