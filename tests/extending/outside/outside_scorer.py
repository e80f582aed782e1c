"""A score of another package that gates can be fitted to: one file, and one line in its entry points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moacompress.calibration.gates.scorers import LayerTokens, Scorer

NAME = "key-norm"


@dataclass(frozen=True)
class KeyNorm(Scorer):
    """The inverse of the norm of a token's key."""

    name = NAME

    def importance(self, layer: int, tokens: LayerTokens, prepared: Any) -> Tensor:
        """Returns the inverse."""
        return 1 / tokens.key.norm(dim=-1).clamp_min(1e-6)
