"""The gates of a model as a file holds them: linear probes of what enters a layer's attention, one for each KV head."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from moacompress.core.errors import PlanError
from moacompress.core.files import write_bytes

DIGITS = 16
"""Hexadecimal digits of a fingerprint of gates."""
MAX_NUMBERS = 1 << 28
"""Most numbers that are read of a file of gates."""


@dataclass(frozen=True, eq=False)
class GateWeights:
    """`score = weight . input + bias`: the higher, the sooner a token is kept.

    Attributes:
        weight: float32 `[layers, kv_heads, inputs]`.
        bias: float32 `[layers, kv_heads]`.
    """

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]

    @property
    def fingerprint(self) -> str:
        """Hash of their numbers, as `Plan.gates` names them."""
        found = hashlib.sha256(str(self.weight.shape).encode())
        for part in (self.weight, self.bias):
            found.update(np.ascontiguousarray(part, "<f4").tobytes())
        return found.hexdigest()[:DIGITS]

    def of_heads(self, heads: range) -> GateWeights:
        """Returns those of some neighbouring KV heads of every layer."""
        return GateWeights(self.weight[:, heads.start : heads.stop], self.bias[:, heads.start : heads.stop])

    def save(self, path: Path, notes: Mapping[str, str] | None = None) -> None:
        """Writes them as safetensors, atomically; of several `notes` the order, and so the bytes, may differ each time."""
        data = save({"weight": self.weight, "bias": self.bias}, metadata=None if notes is None else dict(notes))
        write_bytes(path, data)

    @staticmethod
    def load(path: Path, heads: tuple[int, int], fingerprint: str) -> GateWeights:
        """Reads the gates that a plan names by `fingerprint`; `heads` are its model's layers, and KV heads of a layer.

        Raises:
            PlanError: unreadable, of other sizes, or other gates.
        """
        try:
            with safe_open(str(path), framework="numpy") as file:
                sizes = [tuple(file.get_slice(name).get_shape()) for name in ("weight", "bias")]
                if len(sizes[0]) != 3 or not sizes[0][:2] == sizes[1] == heads or math.prod(sizes[0]) > MAX_NUMBERS:
                    raise PlanError(
                        f"the gates in {path} have the sizes {sizes[0]} and {sizes[1]}; the plan's model has {heads[0]} layers "
                        f"of {heads[1]} KV heads"
                    )
                found = GateWeights(*(file.get_tensor(name).astype(np.float32) for name in ("weight", "bias")))
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            raise PlanError(f"cannot read the gates in {path}: {error}") from error
        if found.fingerprint != fingerprint:
            raise PlanError(
                f"the gates in {path} are not those of the plan: it names {fingerprint}, these are {found.fingerprint}; search "
                "again, or put the file there that the search wrote beside the plan"
            )
        return found
