"""The most that a plan takes of the dense bytes at any length, not only at those that it was searched at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moacompress.rules.budget import format_length
from moacompress.rules.cost import AT_ONCE, kv_shares
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.windows import BETA_ONE, BLOCK, RUNS

LEAST_END = 1 << 16
"""Tokens up to which every length is counted at least; where longer ones were profiled, up to twice the longest."""


@dataclass(frozen=True)
class WorstShare:
    """A bound of the bytes of a plan's cache as a share of the dense model's.

    Every length from `begin` up to `end` is counted, in whole blocks as the cache takes them. Beyond, a window is at most
    linear in the number of tokens, so that what the plan takes over what dense takes is at most a ratio of two lines, which
    rises or falls all the way: its larger end is `beyond`.

    Attributes:
        begin: the shortest profiled length, tokens.
        end: tokens.
        share: the most from `begin` to `end`, exactly.
        length: where that is, the shortest of equals, tokens.
        beyond: more than the share at any length above `end`, or equal to it.
    """

    begin: int
    end: int
    share: float
    length: int
    beyond: float

    @staticmethod
    def of(plan: Plan, lengths: Sequence[int] = ()) -> WorstShare:
        """Finds the worst share of a plan from the shortest profiled length on; lengths are by default those in its notes."""
        lengths = lengths or plan.profiled_lengths
        begin, longest = min(lengths), max(lengths)
        end = max(2 * longest, LEAST_END)
        best = (-1.0, begin)
        for first in range(begin, end + 1, AT_ONCE):
            shares = kv_shares(plan, np.arange(first, min(first + AT_ONCE, end + 1), dtype=np.int64))
            at = int(shares.argmax())
            best = max(best, (float(shares[at]), first + at), key=lambda found: found[0])
        return WorstShare(begin, end, *best, _beyond(plan, end))

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        where = f"from {format_length(self.begin)} tokens on"
        if self.beyond <= self.share:
            return f"at most {self.share:.1%} of the dense bytes {where} (at {self.length:,})"
        return (
            f"at most {self.beyond:.1%} of the dense bytes {where} (beyond {self.end:,}; {self.share:.1%} up to there, at "
            f"{self.length:,})"
        )


def _beyond(plan: Plan, end: int) -> float:
    """Returns what the share does not exceed above a number of tokens."""
    shape = plan.model
    fixed, growing, dense_fixed, dense_growing, most = 0.0, 0.0, 0, 0, 0.0
    full = shape.token_bytes(Rule.FULL)
    for layer, (row, native) in enumerate(zip(plan.rules, shape.native_windows, strict=True)):
        for rule in row:
            tokens, slope = _line(rule, plan.min_window, native)
            size = shape.token_bytes(rule, reuses=plan.share(layer) is not None)
            fixed += tokens * size
            growing += slope * size
            most = max(most, size / full)
        dense_fixed += shape.kv_heads * full * (min(native, end) if native else 0)
        dense_growing += shape.kv_heads * full * (not native)
    ends = [(fixed + growing * end) / (dense_fixed + dense_growing * end)]
    ends += [growing / dense_growing] if dense_growing else []
    # without gates no KV head touches more blocks than the dense one does
    return max(ends) if plan.selects else min(max(ends), most)


def _line(rule: Rule, min_window: int, native: int | None) -> tuple[float, float]:
    """Returns tokens, and tokens per token, which a rule's slots do not exceed: each end of a run may lie within a block."""
    blocks = RUNS * 2 * BLOCK
    slope = min(rule.beta_q, BETA_ONE) / BETA_ONE
    window = rule.sink + max(rule.alpha, min_window)
    if native:
        return (min(window, native) if not slope else native) + blocks, 0.0
    if rule.sees_all:
        return blocks, 1.0
    # at most (1 - slope) n - alpha + 1 of n tokens are evicted from the window
    share = rule.select_beta_q / BETA_ONE
    chosen = BLOCK + rule.select_alpha + share * (max(0, -rule.alpha) + 1) if rule.selects else 0
    return window + blocks + chosen, slope + share * (1 - slope) * rule.selects
