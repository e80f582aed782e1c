"""What the backward pass of attention knows about a tile of rows: probabilities, and what each rule sees of them.

One pair of cumulative sums over a tile's keys serves all rules; see `influence`, which makes the tiles and has the formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from moacompress.kernels.arguments import Choices, Scores
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import selected


@dataclass(frozen=True)
class AttentionSpec:
    """How a layer attends.

    Attributes:
        scaling: factor of the logits.
        native_window: the model's own sliding window in tokens, or None.
        softcap: logits are `softcap * tanh(logits / softcap)`, or None.
    """

    scaling: float
    native_window: int | None = None
    softcap: float | None = None

    def scores(self, sink_logit: Tensor | None) -> Scores:
        """Returns how scores are made, with a learned sink logit of each query head, `[heads]`, or None."""
        return Scores(self.scaling, self.softcap or 0.0, sink_logit)


class Tile(NamedTuple):
    """Query rows `rows` and the keys `[low, high)`, which hold all that any of them sees.

    Keys are kept newest first: column 0 of a tile is key `high - 1`, so that plain cumulative sums run outward from the
    diagonal. Differences of sums from the far end would lose a window that holds 1e-6 of the probability.
    """

    rows: Tensor
    first_row: int
    last_row: int
    low: int

    @property
    def high(self) -> int:
        """End of its keys: the last row sees itself."""
        return self.last_row + 1

    def columns(self, n: int) -> slice:
        """Returns where its keys are among all `n` keys, newest first."""
        return slice(n - self.high, n - self.low)


def tiles_of(rows: Tensor, native_window: int | None, size: int) -> list[Tile]:
    """Returns the tiles of query positions, int64 and rising, `size` rows each; the last one may have fewer."""
    tiles = []
    for part in rows.split(size):
        first, last = (int(end) for end in part[[0, -1]].tolist())
        tiles.append(Tile(part, first, last, 0 if native_window is None else max(0, first + 1 - native_window)))
    return tiles


def _mask_logits(logits: Tensor, tile: Tile, native_window: int | None) -> None:
    """Sets to -inf what the dense model does not see, in place; only the two edges of the band are touched.

    Logits are `[..., rows, keys of the tile]`.
    """
    keys = torch.arange(tile.high - 1, tile.low - 1, -1, device=logits.device)
    rows = tile.rows[:, None]
    future = tile.last_row - tile.first_row
    logits[..., :future].masked_fill_(keys[:future] > rows, -torch.inf)
    if native_window is not None:
        past = max(0, tile.last_row - native_window + 1 - tile.low)
        logits[..., len(keys) - past :].masked_fill_(keys[len(keys) - past :] <= rows - native_window, -torch.inf)


def tile_probabilities(
    query: Tensor,
    keys: Tensor,
    tile: Tile,
    spec: AttentionSpec,
    sink_logit: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the attention probabilities of a tile.

    Args:
        query: `[kv_heads, group * rows, head_dim]`, scaled.
        keys: `[kv_heads, keys of the tile, head_dim]`, newest first.
        tile: which rows and keys.
        spec: how the layer attends.
        sink_logit: learned sink logit of each query head, `[kv_heads, group, 1, 1]`, or None.

    Returns:
        Probabilities `[kv_heads, group, rows, keys]`; that of the learned sink `[kv_heads, group, rows, 1]` or None;
        the derivative of the soft cap, of the probabilities' shape, or None.
    """
    logits = torch.bmm(query, keys.transpose(1, 2)).view(len(keys), -1, len(tile.rows), keys.shape[1])
    slope = None
    if spec.softcap is not None:
        logits.div_(spec.softcap).tanh_()
        slope = 1 - logits.square()
        logits.mul_(spec.softcap)
    _mask_logits(logits, tile, spec.native_window)
    if sink_logit is None:
        return torch.softmax(logits, -1), None, slope
    total = torch.logaddexp(torch.logsumexp(logits, -1, keepdim=True), sink_logit)
    return logits.sub_(total).exp_(), (sink_logit - total).exp_(), slope


@dataclass(frozen=True)
class TileView:
    """What the backward pass of one layer knows about a tile of rows; collectors read from it what they need.

    Attributes:
        tile: which rows and keys.
        table: the rules, for this layer and on its device.
        probabilities: P, of all that the dense model sees, `[kv_heads, group, rows, keys of the tile]`, newest key first,
            zero where nothing is seen.
        centred: `P * (G - D)`, of the same shape.
        escaped: with a learned sink logit, its probability e and `e * D`, both `[kv_heads, group, rows, 1]`.
        query: scaled queries of the rows, `[kv_heads, group * rows, head_dim]`.
        cotangent: dO of the rows, `[kv_heads, group * rows, head_dim]`.
        keys: keys of the tile, newest first, `[kv_heads, keys, head_dim]`.
        values: values of the tile, newest first, `[kv_heads, keys, head_dim]`.
        choices: what rules that select choose, or None.
    """

    tile: Tile
    table: RuleTable
    probabilities: Tensor
    centred: Tensor
    escaped: tuple[Tensor, Tensor] | None
    query: Tensor
    cotangent: Tensor
    keys: Tensor
    values: Tensor
    choices: Choices | None = None

    @property
    def rows(self) -> Tensor:
        """Query positions, int64 `[rows]`."""
        return self.tile.rows

    @cached_property
    def segments(self) -> tuple[Tensor, Tensor]:
        """`(sink_end, start)` of every row and rule, each `[rows, rules]`: what lies between is hidden."""
        return hidden_spans(self.table, self.rows)

    @cached_property
    def deltas(self) -> Tensor:
        """`d_i(r)`, summed over the query heads of each KV group: `[kv_heads, rows, rules]`.

        Exactly 0 where a rule hides nothing.
        """
        mass, pull = self.visible(self.probabilities), self.visible(self.centred)
        if self.escaped is not None:
            mass += self.escaped[0]
            pull -= self.escaped[1]
        deltas = pull.div_(mass.clamp_min_(torch.finfo(mass.dtype).tiny)).sum(1)
        return deltas.masked_fill_(self.full, 0)

    def visible(self, values: Tensor) -> Tensor:
        """Returns sums over the keys that each rule sees, `[kv_heads, group, rows, rules]`.

        Values are `[kv_heads, group, rows, keys of the tile]`, zero where the dense model sees nothing.
        """
        shape = (*values.shape[:-1], len(self.table))
        total = values.cumsum(-1).gather(-1, self._window_at.expand(shape))
        if self._oldest > 0:
            prefix = functional.pad(values[..., -self._oldest :].flip(-1).cumsum(-1), (1, 0))
            total += prefix.gather(-1, self._sink_at.expand(shape))
        for number, mask in self._selected:
            total[..., number] += (values * mask[:, None]).sum(-1)
        return total

    @cached_property
    def _selected(self) -> list[tuple[int, Tensor]]:
        """Of every rule that selects its number and what it keeps beside sinks and window, bool `[kv_heads, rows, keys]`."""
        if self.choices is None:
            return []
        keys = torch.arange(self.tile.high - 1, self.tile.low - 1, -1, device=self.rows.device)
        found = []
        for number, (way, sink) in enumerate(zip(self.choices.of_rule.tolist(), self._sinks, strict=True)):
            if way < 0:
                continue
            admitted = keys - sink + 1
            evicted = self.choices.evicted[:, way][:, None, keys]
            now = self._left[:, number, None]
            found.append((number, (admitted > 0) & (admitted <= now) & (now < evicted)))
        return found

    @cached_property
    def _sinks(self) -> list[int]:
        """The sink of every rule; a wait of the host, once a tile."""
        sinks: list[int] = self.table.span.sink.tolist()
        return sinks

    @cached_property
    def _left(self) -> Tensor:
        """Number of tokens evicted from the window of every row and rule, `[rows, rules]`."""
        return (self.segments[1] - self.segments[0]).clamp_min(0)

    @cached_property
    def _kept(self) -> Tensor:
        """How many of them each rule keeps, `[rows, rules]`."""
        if self.choices is None:
            return torch.zeros_like(self._left)
        kept: Tensor = selected(self._left, *self.table.select)
        return kept * (self.choices.of_rule >= 0).to(self._left.device)

    @cached_property
    def full(self) -> Tensor:
        """Whether each rule sees all that the dense model sees, bool `[rows, rules]`."""
        return self._kept >= self._left

    @cached_property
    def _window_at(self) -> Tensor:
        return self.tile.high - 1 - self.segments[1]

    @cached_property
    def _oldest(self) -> int:
        """Columns that may be sinks. What the native window hides has probability 0: sums begin at the tile's oldest."""
        return max(0, min(max(self._sinks), self.tile.high) - self.tile.low)

    @cached_property
    def _sink_at(self) -> Tensor:
        return (self.segments[0] - self.tile.low).clamp(0, self._oldest)


class Collector(Protocol):
    """What receives every tile of rows of a layer's backward pass."""

    def add(self, view: TileView) -> None:
        """Takes one tile."""


class CachedPart(NamedTuple):
    """A layer's keys or its values, and what a backward pass says of them, `[1, kv_heads, N, dim]` each.

    Attributes:
        given: as the model makes them, keys after their rotary embedding, less their centre.
        grad: gradient of them.
    """

    given: Tensor
    grad: Tensor


@runtime_checkable
class GradientCollector(Protocol):
    """What receives the gradients of a layer's keys and values, once a backward pass."""

    def take_gradients(self, keys: CachedPart, values: CachedPart) -> None:
        """Takes them."""


def hidden_spans(table: RuleTable, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where what each rule hides begins and ends, `[rows, rules]` each; the native window hides more."""
    (_, sink_end), (start, _) = table.visible_intervals(rows + 1)
    return sink_end, start
