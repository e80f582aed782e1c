"""The profile's sums of a layer, as they are launched; see `profile_kernels`."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from moacompress.core.arrays import Ints
from moacompress.kernels.arguments import Choices, Scores
from moacompress.kernels.triton import profile_kernels, selected_sum_kernels
from moacompress.kernels.triton.cards import card_of
from moacompress.kernels.triton.tile_sizes import profile_constants
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import selected


class Outward(NamedTuple):
    """What the sums of rules are steps of, for so many tokens.

    Attributes:
        starts: where each window begins, int32 `[windows, tokens]`.
        window: of every rule, int64 `[rules]`.
        sinks: numbers of sinks, int32.
        sink: of every rule, int64 `[rules]`.
        left: how many tokens have left the window of each rule as a query attends, `[rules, tokens]`.
        sink_tiles: tiles in which sinks lie.
        events: see `profile_kernels.sum_outward`.
        counts: likewise.
    """

    starts: np.ndarray
    window: Ints
    sinks: np.ndarray
    sink: Ints
    left: Ints
    sink_tiles: int
    events: np.ndarray
    counts: np.ndarray


def outward(rules: RuleTable, tokens: int, queries: int, keys: int) -> Outward:
    """Returns what the sums of rules are steps of.

    Args:
        rules: of one native window, in numpy.
        tokens: of the sample.
        queries: tokens of a tile of queries.
        keys: of a tile of keys.
    """
    return _outward(rules.columns.tobytes(), rules.columns.shape, tokens, queries, keys)


@lru_cache(maxsize=8)
def _outward(columns: bytes, shape: tuple[int, ...], tokens: int, queries: int, keys: int) -> Outward:
    rules = RuleTable(np.frombuffer(columns, np.int64).reshape(shape))
    (_, sink_end), (start, _) = (
        np.broadcast_arrays(*bounds) for bounds in rules.visible_intervals(np.arange(1, tokens + 1))
    )
    starts, window = np.unique(start.T, axis=0, return_inverse=True)
    sinks, sink = np.unique(rules.span.sink, return_inverse=True)
    sink_tiles = -(-min(int(sinks.max()), tokens) // keys)
    first = np.arange(0, tokens, queries)
    last = np.minimum(first + queries, tokens) - 1
    native = int(rules.span.native_window[0]) or tokens
    tile = np.arange(-(-tokens // keys))
    meets = tile < sink_tiles
    meets = np.broadcast_to(meets, (len(first), len(tile))).copy()
    for begins in starts:
        meets |= (tile >= (begins[first] // keys)[:, None]) & (tile <= (begins[last] // keys)[:, None])
    bottom = np.maximum(first - native + 1, 0) // keys
    meets &= (tile <= (last // keys)[:, None]) & (tile >= bottom[:, None])
    counts = meets.sum(1)
    descending = np.argsort(~meets[:, ::-1], axis=1, kind="stable")[:, : max(1, int(counts.max()))]
    events = len(tile) - 1 - descending
    return Outward(
        starts.astype(np.int32),
        window.reshape(-1),
        sinks.astype(np.int32),
        sink.reshape(-1),
        np.maximum(start - sink_end, 0).T,
        sink_tiles,
        events.astype(np.int32),
        counts.astype(np.int32),
    )


def rule_sums(
    dout: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attended: tuple[torch.Tensor, torch.Tensor],
    rules: RuleTable,
    scores: Scores,
    choices: Choices | None,
    *,
    wide: bool,
) -> torch.Tensor:
    """Returns what every rule would move, see `Backend.profile_sums`.

    Args:
        dout: cotangent of the output, `[1, heads, tokens, value_dim]`.
        query: `[1, heads, tokens, head_dim]`.
        key: `[1, kv_heads, tokens, head_dim]`.
        value: `[1, kv_heads, tokens, value_dim]`.
        attended: the output and the log of its denominator, `[1, heads, tokens]`.
        rules: in numpy.
        scores: how scores are made.
        choices: what rules that select choose, or None.
        wide: whether products are in float32.
    """
    (heads, tokens, head_dim), (kv_heads, _, value_dim), device = query.shape[1:], value.shape[1:], query.device
    group = heads // kv_heads
    tiles, constants = profile_constants(
        group,
        head_dim,
        value_dim,
        softcap=bool(scores.softcap),
        wide=wide,
        item_size=query.element_size(),
        card=card_of(device),
    )
    plan = outward(rules, tokens, int(constants["TOKENS"]), tiles.TILE)
    of_spans = (plan.starts, plan.sinks, plan.events, plan.counts)
    starts, sinks, events, counts = (torch.from_numpy(each).to(device) for each in of_spans)
    pulled, lse = dout[0].contiguous(), attended[1][0].float().contiguous()
    delta = (pulled.float() * attended[0][0].float()).sum(-1)
    asked, keys, values = (part[0] if part.stride(-1) == 1 else part[0].contiguous() for part in (query, key, value))
    windows = torch.zeros(len(plan.starts) + 1, 2, heads, tokens, dtype=torch.float32, device=device)
    prefixes = windows.new_zeros(max(plan.sink_tiles, 1), len(plan.sinks), 2, heads, tokens)
    given = (asked, keys, values, pulled, lse, delta)
    numbers = (float(scores.scaling), float(scores.softcap), tokens)
    strides = asked.stride()[:2] + keys.stride()[:2] + values.stride()[:2]
    profile_kernels.sum_outward[(len(plan.counts), kv_heads)](
        *given,
        starts,
        sinks,
        events,
        counts,
        windows,
        prefixes,
        *numbers,
        int(rules.span.native_window[0]) or tokens,
        kv_heads,
        len(plan.starts),
        len(plan.sinks),
        plan.sink_tiles,
        plan.events.shape[1],
        *strides,
        **constants,
        **tiles.options,
    )
    hides, added = plan.left > 0, dict[int, torch.Tensor]()
    if choices is not None and (choices.of_rule >= 0).any():
        selecting = np.flatnonzero(choices.of_rule.numpy() >= 0)
        some, left = RuleTable(rules.columns[:, selecting]), plan.left[selecting]
        hides[selecting] = selected(left, *(each[:, None] for each in some.select)) < left
        arrays = (some.span.sink, choices.of_rule.numpy()[selecting], left)
        chosen = windows.new_zeros(len(selecting), 2, heads, tokens)
        selected_sum_kernels.sum_selected[(len(plan.counts), kv_heads)](
            *given,
            *(torch.from_numpy(np.ascontiguousarray(each, np.int32)).to(device) for each in arrays),
            choices.evicted.to(device).contiguous(),
            chosen,
            *numbers,
            kv_heads,
            len(selecting),
            choices.evicted.shape[1],
            *strides,
            **constants,
            **tiles.options,
        )
        added = dict(zip(selecting.tolist(), chosen, strict=True))
    escaped = torch.zeros_like(lse)
    if scores.sink_logits is not None:
        escaped = torch.exp(scores.sink_logits.float()[:, None] - lse)
    return _summed(plan, windows, prefixes.sum(0), added, torch.from_numpy(hides).to(device), delta, escaped, kv_heads)


def _summed(
    plan: Outward,
    windows: torch.Tensor,
    sinks: torch.Tensor,
    added: dict[int, torch.Tensor],
    hides: torch.Tensor,
    delta: torch.Tensor,
    escaped: torch.Tensor,
    kv_heads: int,
) -> torch.Tensor:
    """Returns the sums of squares and of deltas, float64 `[2, kv_heads, rules]`, from those of windows, sinks and selections.

    Args:
        plan: what belongs to which rule.
        windows: see `profile_kernels.sum_outward`.
        sinks: of all tiles, `[sinks, 2, heads, tokens]`.
        added: of each rule that selects, what `selected_sum_kernels.sum_selected` found, `[2, heads, tokens]`.
        hides: which queries each rule hides something from, bool `[rules, tokens]`.
        delta: what was taken off G, `[heads, tokens]`.
        escaped: probability of the learned logit, likewise.
        kv_heads: of the layer.
    """
    tiny = torch.finfo(torch.float32).tiny
    taken_off = escaped * delta
    mass, pull = windows[-1]
    rest = (pull - taken_off) / (mass + escaped).clamp_min(tiny)  # D as P and G say, less what was taken off
    found = torch.zeros(2, kv_heads, len(plan.window), dtype=torch.float64, device=delta.device)
    for rule, (window, sink) in enumerate(zip(plan.window.tolist(), plan.sink.tolist(), strict=True)):
        mass, pull = windows[window] + sinks[sink] + added.get(rule, 0.0)
        moved = (pull - taken_off) / (mass + escaped).clamp_min(tiny) - rest
        deltas = (moved.view(kv_heads, -1, delta.shape[-1]).sum(1) * hides[rule]).double()
        found[0, :, rule], found[1, :, rule] = deltas.square().sum(1), deltas.sum(1)
    return found
