"""Bytes of the tensors that a pass of a model keeps alive: counted at short lengths, extrapolated to longer ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def _stored(tree: Any) -> Iterator[Tensor]:
    """Yields the tensors of a tree."""
    return (tensor for tensor in tree_iter(tree) if isinstance(tensor, Tensor))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that come to be in its block, as long as anything keeps them.

    Attributes:
        now: bytes alive.
        peak: the most that were alive at a time, after any operation.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage().data_ptr() for tensor in _stored((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _stored(result):
            self._count(tensor.untyped_storage(), given)
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if not size or place in self._alive or place in given:
            return

        def gone(_: object) -> None:
            del self._alive[place]
            self.now -= size

        self._alive[place] = weakref.ref(storage, gone)
        self.now += size


def extrapolated_bytes(found: Mapping[int, int], tokens: int) -> int:
    """Returns the bytes at some tokens, on the polynomial through what was found; it neither falls nor bends down.

    There are bytes at two lengths for a line or at three for a parabola.
    """
    (n0, b0), (n1, b1), *more = sorted(found.items(), reverse=True)
    slope, bend = (b0 - b1) / (n0 - n1), 0.0
    for n2, b2 in more[:1]:
        bend = max(0.0, (slope - (b1 - b2) / (n1 - n2)) / (n0 - n2))
    return max(0, round(b0 + (tokens - n0) * (max(slope, 0.0) + bend * (tokens - n1))))
