"""Which logical blocks a layer's cache holds: two runs for every row and KV head, by arithmetic from the row's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moacompress.core.arrays import Ints
from moacompress.rules.rule import Rule
from moacompress.rules.windows import block_runs

LAG = 128
"""Tokens that a cache which is rolled back (drafts) keeps longer than its plan says."""


class Runs:
    """Logical blocks of every row and KV head: the sinks' `[a, b)` and the window's `[c, d)`.

    Attributes:
        ends: a, b, c and d, int64 `[4, rows, heads]`; compiled kernels write to it.
    """

    def __init__(self, ends: Ints) -> None:
        self.ends = ends

    @staticmethod
    def none(rows: int, heads: int) -> Runs:
        """Returns no blocks."""
        return Runs(np.zeros((4, rows, heads), np.int64))

    @property
    def a(self) -> Ints:
        """First block of the sinks, `[rows, heads]`."""
        return self.ends[0, :, :]

    @property
    def b(self) -> Ints:
        """End of the sinks' blocks, `[rows, heads]`."""
        return self.ends[1, :, :]

    @property
    def c(self) -> Ints:
        """First block of the window, `[rows, heads]`."""
        return self.ends[2, :, :]

    @property
    def d(self) -> Ints:
        """End of the window's blocks, `[rows, heads]`."""
        return self.ends[3, :, :]

    @property
    def blocks(self) -> int:
        """How many there are in all."""
        return int((self.b - self.a + self.d - self.c).sum())

    def of_rows(self, rows: Ints) -> Runs:
        """Returns those of some rows, in that order and with repeats."""
        return Runs(self.ends.take(rows, axis=1))


def rule_groups(rules: Sequence[Rule]) -> tuple[tuple[Rule, tuple[int, ...]], ...]:
    """Returns the KV heads of a layer by rule: they are attended to together. Every full rule is one."""
    groups: dict[Rule, list[int]] = {}
    for head, rule in enumerate(rules):
        groups.setdefault(Rule.FULL if rule.is_full else rule, []).append(head)
    return tuple((rule, tuple(heads)) for rule, heads in groups.items())


class RunRule:
    """What the rules of a layer say about blocks.

    Args:
        rules: the rule of every KV head.
        min_window: the plan's smallest window, tokens.
        native_window: the layer's own sliding window in tokens, or None.

    Attributes:
        columns: sink, alpha and beta_q of every KV head, each int64 `[heads]`, then the two windows (0: no native one), as the
            compiled kernels take them.
    """

    def __init__(self, rules: Sequence[Rule], min_window: int, native_window: int | None) -> None:
        self.heads = len(rules)
        self.bounds = (min_window, native_window)
        columns = zip(*((rule.sink, rule.alpha, rule.beta_q) for rule in rules), strict=True)
        self._sink, self._alpha, self._beta_q = (np.array(column, np.int64) for column in columns)
        numbers = map(torch.from_numpy, (self._sink, self._alpha, self._beta_q))
        self.columns: tuple[torch.Tensor | int, ...] = (*numbers, min_window, native_window or 0)

    def at(self, n: Ints) -> Runs:
        """Returns the blocks that the rules touch at so many tokens, `[rows]`."""
        runs = block_runs(n[:, None], self._sink, self._alpha, self._beta_q, *self.bounds)
        return Runs(np.stack([np.broadcast_to(run, (len(n), self.heads)) for run in runs]))

    def kept(self, lengths: Ints, held: Runs, lag: int) -> Runs:
        """Returns the blocks to hold at so many tokens: what the rules touch, and what rolling back may need.

        Args:
            lengths: tokens of every row, `[rows]`.
            held: the blocks held so far: what is gone stays gone.
            lag: tokens that can be rolled back.
        """
        runs = self.at(lengths)
        if lag:
            earlier = self.at(np.maximum(lengths - lag, 0))
            runs = Runs(np.stack([earlier.a, np.maximum(earlier.b, runs.b), earlier.c, runs.d]))
        a, c = np.maximum(held.a, runs.a), np.maximum(held.c, runs.c)
        b = np.maximum(np.minimum(runs.b, c), a)
        # sinks grow out of the window they lie in; once apart from it they can only shrink
        b = np.where(held.b >= held.c, b, np.minimum(b, np.maximum(held.b, a)))
        return Runs(np.stack([a, b, c, runs.d]))
