"""How every KV head attends, for the report: how far back, how much on the first tokens, how spread out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moacompress.calibration.profile.manifest import DISTANCE_BINS
from moacompress.calibration.profile.tiles import TileView
from moacompress.rules.rule import SINKS

EDGES = torch.tensor([2**power for power in range(DISTANCE_BINS - 1)])
"""End of every distance bin but the last, in tokens, not included: the bins are 0, 1, 2-3, 4-7, ..."""


class HeadSums:
    """How a layer's KV heads attend, mean over the rows of one backward pass and the query heads of each group.

    Rows are those whose cotangent is not zero, as everywhere in the profile. Probabilities are the dense model's. With
    a learned sink logit they add up to less than 1; its own probability counts in the entropy alone.

    Attributes:
        distance: probability by distance `i - j` in tokens, `[kv_heads, DISTANCE_BINS]`; the last bin has no end.
        sink_mass: probability on the first `SINKS` tokens, `[kv_heads, len(SINKS)]`.
        entropy: in nats, `[kv_heads]`.
    """

    def __init__(self, kv_heads: int, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(kv_heads, DISTANCE_BINS + len(SINKS) + 1, dtype=torch.float64, device=device)
        self._edges = EDGES.to(device)
        self._rows = 0

    def add(self, view: TileView) -> None:
        """Adds a tile."""
        mean = view.probabilities.mean(1, dtype=torch.float64)
        entropy = torch.special.entr(view.probabilities).sum(-1)
        if view.escaped is not None:
            entropy += torch.special.entr(view.escaped[0])[..., 0]
        found = [_by_distance(view, mean, self._edges), _on_first(view, mean), entropy.double().mean(1)[..., None]]
        self._sums += torch.cat(found, -1).sum(1)
        self._rows += len(view.rows)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the means by name; see the class."""
        distance, sink_mass, entropy = (self._sums / max(1, self._rows)).split([DISTANCE_BINS, len(SINKS), 1], -1)
        return {"distance": distance, "sink_mass": sink_mass, "entropy": entropy[:, 0]}


def _by_distance(view: TileView, probabilities: Tensor, edges: Tensor) -> Tensor:
    """Returns the probability in every bin, `[kv_heads, rows, bins]`, from `[kv_heads, rows, keys of the tile]`."""
    keys = probabilities.shape[-1]
    last = (view.tile.last_row - view.rows[:, None] + edges).clamp_(max=keys) - 1  # column of the bin's farthest key
    nearer = probabilities.cumsum(-1).gather(-1, last.expand(len(probabilities), -1, -1))
    ends = torch.cat([nearer, probabilities.sum(-1, keepdim=True)], -1)
    return functional.pad(ends, (1, 0)).diff(dim=-1).clamp_min_(0)


def _on_first(view: TileView, probabilities: Tensor) -> Tensor:
    """Returns the probability on the first tokens, `[kv_heads, rows, len(SINKS)]`; arguments as `_by_distance`."""
    keys = probabilities.shape[-1]
    ends = [max(0, keys - max(0, sink - view.tile.low)) for sink in SINKS]
    return torch.stack([probabilities[..., end:].sum(-1) for end in ends], -1)
