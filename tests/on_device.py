"""Triton's kernels on a device, for cases that lie on the CPU: what a call is given goes there as it lies, and comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from moacompress.kernels.arguments import CacheView, Scores, SelectedView
from moacompress.kernels.backend import Backend
from moacompress.kernels.capabilities import Status
from moacompress.kernels.triton.triton_backend import DTYPES, TritonBackend


class Copies:
    """Copies of tensors on a device, in memory laid out as theirs: strides, offsets and what lies between stay.

    Args:
        device: where to.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the copy of a tensor; one that needs gradients is copied as PyTorch does, so that they come back."""
        if tensor.requires_grad and torch.is_grad_enabled():
            return tensor.to(self.device)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._memory:
            held = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
            self._memory[storage.data_ptr()] = held, held.to(self.device)
        there = self._memory[storage.data_ptr()][1]
        whole = len(there) // tensor.element_size() * tensor.element_size()
        laid = (tensor.shape, tensor.stride(), tensor.storage_offset())
        return there[:whole].view(tensor.dtype).as_strided(*laid)

    def of_all(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Returns the copies of tensors."""
        return [self.of(tensor) for tensor in tensors]

    def of_cache(self, cache: CacheView) -> CacheView:
        """Returns a view of the pool's copy, with the same table."""
        return cache._replace(keys=self.of_all(cache.keys), values=self.of_all(cache.values))

    def of_scores(self, scores: Scores) -> Scores:
        """Returns the same with a copy of learned logits."""
        return scores if scores.sink_logits is None else scores._replace(sink_logits=self.of(scores.sink_logits))

    def write_back(self) -> None:
        """Copies the memory back to where it is from."""
        for held, there in self._memory.values():
            held.copy_(there)


class OnDevice(Backend):
    """As Triton's backend, of whose calls this has those that take and give tensors; rings stay where their cache is.

    Args:
        device: where the kernels run.
    """

    name = TritonBackend.name
    capabilities = replace(TritonBackend.capabilities, ring=False)

    def __init__(self, device: str) -> None:
        self.device, self.kernels = torch.device(device), TritonBackend()

    def status(self) -> Status:
        return self.kernels.status()

    def supports(self, device: str, dtype: torch.dtype) -> bool:
        return device == "cpu" and dtype in DTYPES

    def decode(
        self, query: torch.Tensor, *, cache: CacheView, scores: Scores, **rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        there = Copies(self.device)
        cache, scores = there.of_cache(cache), there.of_scores(scores)
        return _here(self.kernels.decode(there.of(query), cache=cache, scores=scores, **rest))

    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        cache: CacheView,
        scores: Scores,
        **rest: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        there = Copies(self.device)
        cache, scores = there.of_cache(cache), there.of_scores(scores)
        chunk = there.of_all((query, key, value))
        return _here(self.kernels.prefill(*chunk, cache=cache, scores=scores, **rest))

    def decode_selecting(
        self, query: torch.Tensor, *, cache: CacheView, selected: SelectedView, scores: Scores, **rest: Any
    ) -> torch.Tensor:
        there = Copies(self.device)
        cache, scores = there.of_cache(cache), there.of_scores(scores)
        selected = selected._replace(scores=there.of_all(selected.scores))
        out = self.kernels.decode_selecting(there.of(query), cache=cache, selected=selected, scores=scores, **rest)
        there.write_back()
        return out.to("cpu")

    def move_selected(
        self,
        kv_parts: Any,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        scores: Sequence[torch.Tensor],
        **rest: Any,
    ) -> None:
        there = Copies(self.device)
        self.kernels.move_selected(kv_parts, *map(there.of_all, (keys, values, scores)), **rest)
        there.write_back()

    def append(
        self,
        kv_parts: Any,
        key: torch.Tensor | None,
        value: torch.Tensor,
        *,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        **rest: Any,
    ) -> None:
        there = Copies(self.device)
        own = None if key is None else there.of(key)
        keys, values = there.of_all(keys), there.of_all(values)
        self.kernels.append(kv_parts, own, there.of(value), keys=keys, values=values, **rest)
        there.write_back()


def _here(found: tuple[torch.Tensor, torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor | None]:
    out, lse = found
    return out.to("cpu"), None if lse is None else lse.to("cpu")
