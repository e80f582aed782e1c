"""What is gathered from a layer's backward pass, one small class a statistic; see `influence.TileView`.

Every collector is of one layer and adds up in float64: tile by tile, or what a compiled sweep over all tiles has summed up
(`take`). `tensors` gives its sums by name, `reset` forgets them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moacompress.calibration.profile.sweep import LayerSums
from moacompress.calibration.profile.tiles import TileView


class InfluenceSums:
    """The sums of one backward pass that the expected KL is made of.

    Attributes:
        squares: `sum_i d_i^2`, `[kv_heads, rules]`.
        total: `sum_i d_i`, `[kv_heads, rules]`.
    """

    baselines = False
    lag = None

    def __init__(self, kv_heads: int, rules: int, device: torch.device | str = "cpu") -> None:
        self.squares = torch.zeros(kv_heads, rules, dtype=torch.float64, device=device)
        self.total = torch.zeros_like(self.squares)

    def reset(self) -> None:
        """Forgets everything, for the next backward pass."""
        self.squares.zero_()
        self.total.zero_()

    def add(self, view: TileView) -> None:
        """Adds a tile."""
        deltas = view.deltas.double()
        self.total += deltas.sum(1)
        self.squares += deltas.square_().sum(1)

    def add_sums(self, sums: LayerSums) -> None:
        """Adds the sums of all tiles."""
        self.total += sums.total
        self.squares += sums.squares

    def tensors(self) -> dict[str, Tensor]:
        """Returns the sums by name, `[kv_heads, rules]`."""
        return {"squares": self.squares, "total": self.total}


class BaselineSums:
    """The sums of the estimators that others use, as baselines.

    Attributes:
        moa: MoA's `sum |E_ij|` over what a rule masks, `E_ij = -P_ij / (1 - P_ij) (G_ij - D_i)` (arXiv 2406.14909,
            equation 3), query heads of a group added, `[kv_heads, rules]`. The loss is whatever the backward pass
            began at; MoA's own is the cross-entropy of the answer.
        mass: probability that a rule masks, mean over query heads and rows, `[kv_heads, rules]`.
    """

    baselines = True
    lag = None

    def __init__(self, kv_heads: int, rules: int, device: torch.device | str = "cpu") -> None:
        self.moa = torch.zeros(kv_heads, rules, dtype=torch.float64, device=device)
        self._mass = torch.zeros_like(self.moa)
        self._rows = 0

    def reset(self) -> None:
        """Forgets everything, for the next backward pass."""
        self.moa.zero_()
        self._mass.zero_()
        self._rows = 0

    def add(self, view: TileView) -> None:
        """Adds a tile."""
        alone = 1 - view.probabilities
        effect = view.centred.abs().div_(alone.clamp_min_(torch.finfo(alone.dtype).eps))
        self.moa += _masked(view, effect).sum((1, 2))
        self._mass += _masked(view, view.probabilities).mean(1).sum(1)
        self._rows += len(view.rows)

    def add_sums(self, sums: LayerSums) -> None:
        """Adds the sums of all tiles."""
        assert sums.moa is not None  # `baselines` asks for it
        assert sums.mass is not None
        self.moa += sums.moa
        self._mass += sums.mass
        self._rows += sums.rows

    @property
    def mass(self) -> Tensor:
        """Attention mass of every key, float32 `[kv_heads, tokens]`."""
        return self._mass / max(1, self._rows)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the sums by name, `[kv_heads, rules]`."""
        return {"moa": self.moa, "mass": self.mass}


class TokenSums:
    """What hiding single tokens would do to one backward pass: what a gate learns to predict.

    `c_ij = P_ij (G_ij - D_i)`, summed over the query heads of a group, is what hiding key j alone moves the output of query i
    along the cotangent, to first order in its probability. What counts is the sum of the squares over the queries that stand
    `lag` tokens or more behind the key.

    Args:
        kv_heads: KV heads of the layer.
        tokens: of the sample.
        lag: queries that are nearer to a key do not count: any window shows it to them.
        device: of the sums.

    Attributes:
        of_tokens: the sums, `[kv_heads, tokens]`.
    """

    baselines = False

    def __init__(self, kv_heads: int, tokens: int, lag: int, device: torch.device | str = "cpu") -> None:
        self.lag: int | None = lag
        self.of_tokens = torch.zeros(kv_heads, tokens, dtype=torch.float64, device=device)

    def add(self, view: TileView) -> None:
        """Adds a tile."""
        keys = torch.arange(view.tile.high - 1, view.tile.low - 1, -1, device=view.rows.device)
        moved = view.centred.sum(1).double().masked_fill_(view.rows[:, None] - keys < (self.lag or 0), 0)
        self.of_tokens[:, keys] += moved.square_().sum(1)

    def add_sums(self, sums: LayerSums) -> None:
        """Adds the sums of all tiles."""
        assert sums.of_tokens is not None  # `lag` asks for it
        self.of_tokens += sums.of_tokens

    def tensors(self) -> dict[str, Tensor]:
        """Returns the sums by name."""
        return {"of_tokens": self.of_tokens}


def _masked(view: TileView, values: Tensor) -> Tensor:
    """Returns sums of non-negative values over the keys that each rule hides, `[kv_heads, group, rows, rules]`."""
    values = values.double()
    hidden = values.sum(-1, keepdim=True) - view.visible(values)
    return hidden.clamp_min_(0).masked_fill_(view.full, 0)
