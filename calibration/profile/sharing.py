"""What it would cost a layer to attend with the probabilities of an earlier layer, its anchor, and its own values.

In a copy, query head (h, g) of KV head h attends as query head (m, g) of the anchor does, m = head_map[h]. With the
notation of `influence` and the anchor's probabilities P', its output moves along the cotangent by

    d_i = sum_g dO_(h,g),i . (P'_(m,g) V_h - O_(h,g))_i = sum_g [ sum_j P'_ij (G_ij - D_i) - e'_i D_i ]

where e' is the probability of the anchor's learned sink logit, if it has one. This is exact, as for rules, and half of
its expected square is the predicted KL. Every pair of an own and an anchor KV head is tried: what a head map costs is
the sum over own heads.

A layer may copy an earlier layer with the same native window only; `copyable` says which. Statistics of other pairs of
layers are 0, so that all arrays are finite and of one shape: they mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moacompress.calibration.profile.statistics import Statistics, kl_of_squares
from moacompress.calibration.profile.tiles import AttentionSpec, Tile, TileView, tile_probabilities
from moacompress.core.errors import UsageError


@dataclass(frozen=True)
class Attended:
    """What a layer attended with in the forward pass, from which its probabilities can be had again.

    A recording that keeps this of every layer holds two tensors a layer, in the model's dtype: where the layers keep
    all that their backward pass needs, the very ones that are there anyway; where layers run twice, beyond that.

    Attributes:
        query: `[1, heads, N, head_dim]`, not scaled, detached.
        key: `[1, kv_heads, N, head_dim]`, detached.
        sink_logit: learned sink logit of each query head, `[heads]`, or None.
        spec: how the layer attends.
        value: `[1, kv_heads, N, value_dim]`, detached, where the recording keeps values.
    """

    query: Tensor
    key: Tensor
    sink_logit: Tensor | None
    spec: AttentionSpec
    value: Tensor | None = None

    def probabilities(self, tile: Tile, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Returns how a tile of rows attends.

        The tile may be on any device. Probabilities are `[kv_heads, group, rows, keys of the tile]`, newest key first; that of
        the learned sink is `[kv_heads, group, rows, 1]`, or None.
        """
        kv_heads, size = self.key.shape[1], self.key.shape[3]
        tile = tile._replace(rows=tile.rows.to(self.query.device))
        query = self.query[0, :, tile.rows].to(dtype).reshape(kv_heads, -1, size) * self.spec.scaling
        keys = self.key[0, :, tile.low : tile.high].to(dtype).flip(1)
        sink = None if self.sink_logit is None else self.sink_logit.to(dtype).view(kv_heads, -1, 1, 1)
        probabilities, escape, _ = tile_probabilities(query, keys, tile, self.spec, sink)
        return probabilities, escape


def copyable(native_windows: Sequence[int | None], anchors: int) -> npt.NDArray[np.bool_]:
    """Returns whether layer `l` may copy layer `l - 1 - k`: `[layers, anchors]`, k along the last axis."""
    may = np.zeros((len(native_windows), anchors), np.bool_)
    for layer, window in enumerate(native_windows):
        for index in range(min(anchors, layer)):
            may[layer, index] = native_windows[layer - 1 - index] == window
    return may


class CopySums:
    """The statistics of a layer's copies: one backward pass after another, each ended by `end`.

    Args:
        attended: of the layer itself and of the anchors, by layer; read while tiles come in.
        layer: the layer.
        allowed: one row of `copyable`.
        kv_heads: KV heads of a layer.
        device: of the sums.
    """

    def __init__(
        self,
        attended: Mapping[int, Attended],
        layer: int,
        allowed: Sequence[bool],
        kv_heads: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._attended, self._layer = attended, layer
        self._anchors = [index for index, may in enumerate(allowed) if may]
        self._squares = torch.zeros(len(allowed), kv_heads, kv_heads, dtype=torch.float64, device=device)
        self._cosine = torch.zeros_like(self._squares)
        self._rows, self._draws = 0, 0

    def add(self, view: TileView) -> None:
        """Adds a tile."""
        if not self._anchors:
            return
        own = view.probabilities
        pulled = torch.bmm(view.cotangent, view.values.transpose(1, 2)).view_as(own)
        delta = (own * pulled).sum(-1, keepdim=True)
        pulled.sub_(delta)
        first = self._draws == 0  # probabilities are the same in every pass
        direction = _directions(own) if first else None
        for index in self._anchors:
            probabilities, escape = self._of_layer(self._layer - 1 - index, view)
            deltas = torch.einsum("hgij,mgij->hmi", pulled, probabilities)
            if escape is not None:
                deltas -= torch.einsum("hgi,mgi->hmi", delta[..., 0], escape[..., 0])
            self._squares[index] += deltas.double().square().sum(-1)
            if direction is not None:
                cosines = torch.einsum("hgij,mgij->hmi", direction, _directions(probabilities))
                self._cosine[index] += cosines.double().sum(-1) / own.shape[1]
        self._rows += len(view.rows) if first else 0

    def _of_layer(self, layer: int, view: TileView) -> tuple[Tensor, Tensor | None]:
        own, escape = self._attended[layer].probabilities(view.tile, view.probabilities.dtype)
        device = view.rows.device  # an anchor may lie on another one
        return own.to(device), None if escape is None else escape.to(device)

    def end(self) -> None:
        """Ends a backward pass."""
        self._draws += 1

    def tensors(self) -> dict[str, Tensor]:
        """Returns the statistics by name, `[anchors, kv_heads, anchor's kv_heads]` each.

        `copy_squares` is `sum_i d_i^2`, mean over the passes that have ended.
        `copy_cosine` is the cosine of the two rows of probabilities, mean over rows and the query heads of a group
        (arXiv 2409.14595 goes by such a similarity).
        """
        return {
            "copy_squares": self._squares / max(1, self._draws),
            "copy_cosine": self._cosine / max(1, self._rows),
        }


def _directions(probabilities: Tensor) -> Tensor:
    directions: Tensor = torch.nn.functional.normalize(probabilities, dim=-1, eps=torch.finfo(probabilities.dtype).tiny)
    return directions


def copy_influence(statistics: Statistics) -> npt.NDArray[np.float64]:
    """Returns the predicted KL of one KV head that copies, in nats per answer token, a mean over samples as for rules.

    It means nothing (and is 0) where `copyable` is False.

    Returns:
        `[layers, anchors, kv_heads, anchor's kv_heads]`; the anchor of `[l, k]` is layer `l - 1 - k`.

    Raises:
        UsageError: statistics without copies.
    """
    if "copy_squares" not in statistics.arrays:
        raise UsageError(
            "the profile has no statistics of copies; profile again with --anchors 2 (profile.anchors of 1 or more)"
        )
    return kl_of_squares(statistics.arrays["copy_squares"])


def best_head_map(influence: npt.NDArray[np.float64]) -> tuple[tuple[int, ...], float]:
    """Returns the cheapest anchor KV head of every own KV head, and the sum of their costs in nats.

    `influence` is that of a copy, `[kv_heads, anchor's kv_heads]`.
    """
    chosen = influence.argmin(1)
    return tuple(chosen.tolist()), float(influence.min(1).sum())
