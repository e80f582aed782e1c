"""Whose weights these are: the fingerprint of a model's weights, which profiles and plans hold.

It says how it was made in front, as in `2-0123456789abcdef`. Numbers are rounded to bfloat16, so that loads of one checkpoint
agree: of a checkpoint in bfloat16 those in float32 and bfloat16, and in float16 where that holds its numbers exactly; of one in
float32 those in float32 and bfloat16. So what is told apart of float32 weights is their bfloat16: a change too small to move a
single number to another bfloat16 is not seen. Weights in blocks count as the numbers that they stand for: a model has one
fingerprint, however its weights are kept.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moacompress.models.placement import tensor_in_memory
from moacompress.models.tensor_parallel import is_sharded

if TYPE_CHECKING:
    import torch

    from moacompress.kernels.weight_blocks import WeightType

CHUNK = 1 << 20
"""Numbers that are hashed at once; part of what hashes are."""
QUEUED = 2
"""Chunks that wait for each thread, at most: with CHUNK they bound the memory."""


ADDED = "added_by_moacompress"
"""Attribute of a module that is none of the model's own, as gates are: its weights are not part of a fingerprint."""


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Returns the fingerprint of a model's weights: of every parameter and saved buffer each name, the shape and all numbers.

    Tensors are cut into chunks of CHUNK numbers in row-major order, which this thread rounds and brings to the host and other
    threads hash; of a tensor that goes by several names (tied weights) this is done once. Offloaded ones are read one by one.

    Raises:
        ModelError: some weights are neither in memory nor offloaded by a device map.
    """
    import torch

    from moacompress.models.block_layers import block_weights

    kinds = block_weights(model)
    tensors = {
        name: value for name, value in _own(model, model.state_dict().items()) if isinstance(value, torch.Tensor)
    }
    shapes, places = dict[str, tuple[int, ...]](), dict[str, tuple[Any, ...]]()
    parts: dict[Any, list[Future[bytes]]] = {}
    waiting: deque[Future[bytes]] = deque()
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        for name, tensor in tensors.items():
            place = places[name] = (name,) if tensor.is_meta or is_sharded(tensor) else _place(tensor)
            numbers = _Numbers(tensor_in_memory(model, name, tensor), kinds.get(name))
            shapes[name] = numbers.shape
            if place in parts:
                continue
            hashes = parts[place] = []
            for start in range(0, numbers.count, CHUNK):
                hashes.append(pool.submit(_hash, _flat_array(numbers.part(start, start + CHUNK))))
                waiting.append(hashes[-1])
                if len(waiting) > QUEUED * threads:
                    waiting.popleft().result()
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        kind = "" if tensor.is_floating_point() or name in kinds else f" {tensor.dtype}"
        digest.update(f"{name} {shapes[name]}{kind}\n".encode())
        for part in parts[places[name]]:
            digest.update(part.result())
    return f"2-{digest.hexdigest()[:16]}"


class _Numbers:
    """The numbers that a tensor stands for, in row-major order; `kind` is of its blocks, None for numbers."""

    def __init__(self, tensor: torch.Tensor, kind: WeightType | None) -> None:
        self._tensor, self._kind = tensor, kind
        self.shape = tuple(tensor.shape)
        if kind is not None:
            self.shape = (*self.shape[:-1], kind.inputs(self.shape[-1]))
        self.count = math.prod(self.shape)

    @cached_property
    def _flat(self) -> torch.Tensor:
        return self._tensor.reshape(-1)  # a copy where it does not lie in order

    def part(self, start: int, stop: int) -> torch.Tensor:
        """Returns the numbers from one to another, `[numbers]`; of blocks only the rows that they lie in are dequantized."""
        if self._kind is None:
            return self._flat[start:stop]
        from moacompress.kernels.weight_blocks import dequantized

        inputs = self.shape[-1]
        first = start // inputs
        rows = self._tensor[first : -(-min(stop, self.count) // inputs)]
        return dequantized(rows, self._kind).reshape(-1)[start - first * inputs : stop - first * inputs]


def _own(model: torch.nn.Module, named: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Returns what is named, sorted, without what lies in modules that are none of the model's own."""
    added = tuple(f"{name}." for name, module in model.named_modules() if getattr(module, ADDED, False))
    return sorted(item for item in named if not item[0].startswith(added)) if added else sorted(named)


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Returns what is the same for two names of one tensor."""
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _flat_array(numbers: torch.Tensor) -> npt.NDArray[Any]:
    """Returns a flat tensor on the host: of floats the bits of their bfloat16, int16, of anything else the bytes, uint8."""
    import torch

    if numbers.is_floating_point():
        return numbers.to(torch.bfloat16).view(torch.int16).cpu().numpy()
    return numbers.contiguous().view(torch.uint8).cpu().numpy()


def _hash(data: npt.NDArray[Any]) -> bytes:
    """Returns the SHA-256 of what `_flat_array` returned.

    All NaNs count as one, and numbers below the smallest normal one as 0, without a sign: there processors differ, and so do
    conversions.
    """
    if data.dtype == np.int16:
        size = data & 0x7FFF
        none, small = size > 0x7F80, size < 0x0080
        if none.any() or small.any():
            data = data.copy()
            np.copyto(data, 0x7FC0, where=none)
            np.copyto(data, 0, where=small)
        data = data.astype("<i2", copy=False)
    return hashlib.sha256(data.data).digest()
