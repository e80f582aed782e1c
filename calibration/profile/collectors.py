"""What is gathered from a layer's backward pass, one small class a statistic; see `influence.TileView`.

Every collector is of one layer and adds up in float64: tile by tile, or what a compiled sweep over all tiles has summed up
(`add_sums`). `tensors` gives its sums by name, `reset` forgets them for the next backward pass.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from moacompress.calibration.profile.statistics import DISTANCE_BINS
from moacompress.calibration.profile.tiles import TileView
from moacompress.rules.rule import SINKS


class LayerSums(NamedTuple):
    """What a layer's whole backward pass sums up to, each float64 `[kv_heads, rules]`.

    Attributes:
        squares: `sum_i d_i^2`.
        total: `sum_i d_i`.
        moa: MoA's `sum |E_ij|` over what a rule masks; None where no collector asks for it.
        mass: the probability that a rule masks, mean over query heads, summed over rows; None where `moa` is.
        rows: rows that took part.
        of_tokens: influence of single tokens, `[kv_heads, tokens]`; None where no collector asks for it.
    """

    squares: Tensor
    total: Tensor
    moa: Tensor | None
    mass: Tensor | None
    rows: int
    of_tokens: Tensor | None = None


@runtime_checkable
class SumCollector(Protocol):
    """A collector that needs only the sums of a whole backward pass, and then is given no tiles.

    Attributes:
        baselines: whether it needs `moa` and `mass`.
        lag: where it needs `of_tokens`, tokens from a key on before which queries do not count; one for all collectors.
    """

    baselines: bool
    lag: int | None

    def add_sums(self, sums: LayerSums) -> None:
        """Adds the sums of all tiles."""


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
        """Forgets the sums."""
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
        """Returns the sums by name."""
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

    @property
    def mass(self) -> Tensor:
        """Probability that a rule masks."""
        return self._mass / max(1, self._rows)

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

    def tensors(self) -> dict[str, Tensor]:
        """Returns the sums by name."""
        return {"moa": self.moa, "mass": self.mass}


def _masked(view: TileView, values: Tensor) -> Tensor:
    """Returns sums of non-negative values over the keys that each rule hides, `[kv_heads, group, rows, rules]`."""
    values = values.double()
    hidden = values.sum(-1, keepdim=True) - view.visible(values)
    return hidden.clamp_min_(0).masked_fill_(view.full, 0)


class TokenSums:
    """What hiding single tokens would do to one backward pass: what a gate learns to predict.

    `c_ij = P_ij (G_ij - D_i)`, summed over the query heads of a group, is what hiding key j alone moves the output of query i
    along the cotangent, to first order in its probability. What counts is the sum of the squares over the queries that stand
    `lag` tokens or more behind the key; any window shows a key to nearer ones.

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


class HeadSums:
    """How a layer's KV heads attend, for the report: mean over the rows of one backward pass and a group's query heads.

    Rows are those whose cotangent is not zero, as everywhere in the profile. Probabilities are the dense model's. With
    a learned sink logit they add up to less than 1; its own probability counts in the entropy alone.

    `distance`: probability by distance `i - j` in tokens, `[kv_heads, DISTANCE_BINS]`; the bins are 0, 1, 2-3, 4-7, ...
    and the last has no end. `sink_mass`: probability on the first `SINKS` tokens, `[kv_heads, len(SINKS)]`. `entropy`: in
    nats, `[kv_heads]`.
    """

    def __init__(self, kv_heads: int, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(kv_heads, DISTANCE_BINS + len(SINKS) + 1, dtype=torch.float64, device=device)
        self._ends = torch.tensor([2**power for power in range(DISTANCE_BINS - 1)], device=device)  # of bins, exclusive
        self._rows = 0

    def add(self, view: TileView) -> None:
        """Adds a tile."""
        mean, keys = view.probabilities.mean(1, dtype=torch.float64), view.probabilities.shape[-1]
        farthest = (view.tile.last_row - view.rows[:, None] + self._ends).clamp_(
            max=keys
        ) - 1  # column of a bin's last key
        nearer = mean.cumsum(-1).gather(-1, farthest.expand(len(mean), -1, -1))
        within = torch.cat([nearer, mean.sum(-1, keepdim=True)], -1)
        distance = functional.pad(within, (1, 0)).diff(dim=-1).clamp_min_(0)
        firsts = [max(0, keys - max(0, sink - view.tile.low)) for sink in SINKS]
        sink_mass = torch.stack([mean[..., first:].sum(-1) for first in firsts], -1)
        entropy = torch.special.entr(view.probabilities).sum(-1)
        if view.escaped is not None:
            entropy += torch.special.entr(view.escaped[0])[..., 0]
        self._sums += torch.cat([distance, sink_mass, entropy.double().mean(1)[..., None]], -1).sum(1)
        self._rows += len(view.rows)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the sums by name."""
        distance, sink_mass, entropy = (self._sums / max(1, self._rows)).split([DISTANCE_BINS, len(SINKS), 1], -1)
        return {"distance": distance, "sink_mass": sink_mass, "entropy": entropy[:, 0]}
