"""The candidate rules that a KV head may get."""

from __future__ import annotations

from collections.abc import Sequence

from moacompress.rules.formats import NATIVE
from moacompress.rules.rule import Rule
from moacompress.rules.windows import BETA_ONE

ELASTIC_SHARES = (1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
MIXED = ((64, 1 / 16), (64, 1 / 8), (128, 1 / 8), (128, 1 / 4))


def candidate_windows(max_length: int, min_window: int) -> list[tuple[int, int]]:
    """Returns the `(alpha, beta_q)` on offer for lengths up to `max_length`, narrowest first, full left out.

    Fixed windows double from `min_window`; elastic ones keep a share of what was seen so far; mixed ones do both.
    """
    fixed = []
    alpha = min_window
    while alpha < max_length:
        fixed.append((alpha, 0))
        alpha *= 2
    elastic = [(0, int(share * BETA_ONE)) for share in ELASTIC_SHARES]
    mixed = [(alpha, int(share * BETA_ONE)) for alpha, share in MIXED]
    return sorted({*fixed, *elastic, *mixed}, key=lambda w: (w[0] + w[1] * max_length / BETA_ONE, w))


def candidate_rules(max_length: int, sinks: Sequence[int], min_window: int) -> tuple[Rule, ...]:
    """Returns every candidate span, native, `Rule.FULL` first, then narrowest window first, for each sink."""
    windows = candidate_windows(max_length, min_window)
    return (Rule.FULL, *(Rule(sink, alpha, beta_q) for sink in sinks for alpha, beta_q in windows))


GATED_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4)
"""Growth of the windows of rules that select."""
CHOSEN_SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
"""Growth of what gates select beside them. Codes take half of the bytes or less, so that a quarter has room for most tokens."""
SMALLEST_CHOICE = 16
"""Fewest tokens that a gate selects, once so many are evicted from the window."""


def gated_rules(max_length: int, sinks: Sequence[int], min_window: int) -> tuple[Rule, ...]:
    """Returns the candidates that keep tokens by their score, native: short windows, and growing ones, each with all choices.

    Their windows are among those of `candidate_rules`. Fixed choices double up to a quarter of the length, growing ones reach
    three quarters of what is evicted from the window; the smallest sink is enough, as a gate keeps what matters of the rest.
    """
    growing, selected = ([(0, int(share * BETA_ONE)) for share in shares] for shares in (GATED_SHARES, CHOSEN_SHARES))
    on_offer = set(candidate_windows(max_length, min_window))
    windows = [
        window for window in ((min_window, 0), (2 * min_window, 0), (4 * min_window, 0), *growing) if window in on_offer
    ]
    fixed, size = [], SMALLEST_CHOICE
    while 4 * size <= max_length:
        fixed.append((size, 0))
        size *= 2
    choices = [*fixed, *selected, (4 * SMALLEST_CHOICE, int(BETA_ONE / 16))]
    return tuple(
        Rule(min(sinks), *window, select_alpha=alpha, select_beta_q=beta_q)
        for window in windows
        for alpha, beta_q in choices
    )


def in_formats(spans: Sequence[Rule], formats: Sequence[str]) -> tuple[Rule, ...]:
    """Returns every native span in every pair of formats of keys and values: the native pair first, then by keys."""
    offered = (NATIVE, *formats)
    return tuple(span.in_formats(keys, values) for keys in offered for values in offered for span in spans)
