"""A way to evict tokens of another package: one file, and one line in its entry points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moacompress.evaluation.eviction.baseline import LayerReading, PromptBaseline

HALF = 0.5


@dataclass(frozen=True)
class NewestHalf(PromptBaseline):
    """Keeps tokens of the last half of a prompt, those with the longest values first."""

    name = "newest-half"
    part: float = HALF

    def layer_scores(self, reading: LayerReading, prepared: Any) -> Tensor:
        """Returns the norm of the value, and 0 in the first half."""
        n = reading.value.shape[1]
        return reading.value.norm(dim=-1) * (torch.arange(n) >= self.part * n)


class Again(NewestHalf):
    """A name that is taken."""

    name = "snapkv"
