"""Which logical blocks a layer's cache holds: runs for every row and KV head, by arithmetic from the row's tokens.

Runs are int64 `[RUNS, 2, rows, heads]`: first block and end of the sinks' run, then of the window's.
"""

from __future__ import annotations

import numpy as np

from moacompress.core.arrays import Ints
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import RUNS

LAG = 128
"""Tokens that a cache which is rolled back (drafts) keeps longer than its plan says."""
BEGIN, END = 0, 1


def no_runs(rows: int, heads: int) -> Ints:
    """Returns no blocks."""
    return np.zeros((RUNS, 2, rows, heads), np.int64)


def run_sizes(runs: Ints) -> Ints:
    """Returns the blocks of every row and KV head, `[rows, heads]`."""
    return np.asarray((runs[:, END] - runs[:, BEGIN]).sum(axis=0))


def kept_runs(rules: RuleTable, lengths: Ints, held: Ints, lag: int) -> Ints:
    """Returns the blocks to hold at so many tokens: what the rules touch, and what rolling back may need.

    `lengths`: tokens of every row, `[rows]`. `held`: the blocks held so far: what is gone stays gone.
    """
    runs = rules.block_runs(lengths)
    if lag:
        earlier = rules.block_runs(np.maximum(lengths - lag, 0))
        runs = np.stack([earlier[:, BEGIN], np.maximum(earlier[:, END], runs[:, END])], axis=1)
    wanted = runs[1:, BEGIN].copy()
    runs[:, BEGIN] = np.maximum(held[:, BEGIN], runs[:, BEGIN])
    for number in range(RUNS - 1):
        begin, after = runs[number, BEGIN], runs[number + 1, BEGIN]
        end = np.maximum(np.minimum(runs[number, END], after), begin)
        # sinks grow out of the window they lie in; once apart from it they can only shrink
        together = held[number, END] >= held[number + 1, BEGIN]
        end = np.where(together, end, np.minimum(end, np.maximum(held[number, END], begin)))
        # what was held as sinks' before a roll back is held where the window was then
        runs[number, END] = np.where(wanted[number] < held[number, END], np.minimum(held[number, END], after), end)
    return runs
