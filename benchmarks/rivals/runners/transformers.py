"""transformers as it is: its default cache, and its quantized ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rivals.runners.engine import Job
from rivals.runners.hf import HfEngine

RESIDUAL = 128
"""transformers' default: tokens that are kept as they are until all are rounded again."""


class Quantized(HfEngine):
    """A `QuantizedCache`: `backend`, `bits` and `axis` are of the setting."""

    def __init__(self, task: Job) -> None:
        super().__init__(task)
        self._task = task
        self.packages = (*HfEngine.packages, {"hqq": "hqq", "quanto": "optimum-quanto"}[task["backend"]])

    def new_cache(self) -> Any:
        """Returns an empty quantized cache."""
        from transformers import QuantizedCache

        axis = self._task["axis"]
        return QuantizedCache(
            backend=self._task["backend"],
            config=self.model.config,
            nbits=self._task["bits"],
            axis_key=axis,
            axis_value=axis,
            residual_length=RESIDUAL,
        )

    def read(self, ids: Sequence[int]) -> None:
        """Reads a prompt; where the number of its tokens is odd the last one comes alone, as hqq packs codes in pairs."""
        end = len(ids) // 2 * 2
        super().read(ids[:end])
        if end < len(ids):
            self.more(ids[end:])


def make(task: Job) -> HfEngine:
    """Returns the engine of a setting: the default cache, or with `backend` a quantized one."""
    return Quantized(task) if "backend" in task else HfEngine(task)
