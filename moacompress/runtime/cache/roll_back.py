"""Forgetting the last tokens of a layer's cache, as long as what the plan needs of the ones before them is still there."""

from __future__ import annotations

import numpy as np

from moacompress.core.arrays import Ints, ragged_ranges
from moacompress.core.errors import UnsupportedError
from moacompress.rules.windows import BLOCK
from moacompress.runtime.cache.block_runs import BEGIN, END, LAG
from moacompress.runtime.cache.layer_blocks import LayerBlocks
from moacompress.runtime.cache.selected_tokens import can_go_back


def check_roll_back(held: LayerBlocks, counts: Ints, *, recording: bool) -> None:
    """Refuses to forget so many of the last real tokens of every row.

    Args:
        held: the layer's blocks.
        counts: tokens to forget, `[rows]`.
        recording: whether `LAG` tokens are kept longer.

    Raises:
        UnsupportedError: what the earlier length needs is gone.
    """
    lengths = held.lengths - counts
    needed, runs = held.rules.block_runs(lengths), held.runs
    gone = needed[-1, BEGIN] < runs[-1, BEGIN]
    for number in range(len(needed) - 1):
        begin, end = needed[number]
        # needed blocks between those held and the run after them
        apart = np.minimum(end, runs[number + 1, BEGIN]) > np.maximum(begin, runs[number, END])
        gone |= (end > begin) & ((begin < runs[number, BEGIN]) | apart)
    unknown = held.selected is not None and bool(counts.any()) and not can_go_back(held, lengths)
    if bool((lengths < 0).any() or gone.any() or unknown):
        kept = f"the last {LAG} tokens can be rolled back" if recording else "nothing was kept to roll back to"
        raise UnsupportedError(
            f"a compressed cache cannot be rolled back by {int(counts.max())} tokens: evicted keys are gone and {kept}; "
            "draft fewer tokens at a time, or fork() the cache before what is to be undone"
        )


def roll_back(held: LayerBlocks, counts: Ints) -> None:
    """Forgets the last real tokens of every row, `counts` of each, `[rows]`; `check_roll_back` has let them pass."""
    lengths = held.lengths - counts
    end = -(-lengths[:, None] // BLOCK)
    with held.pool.lock:
        for low, high in held.runs:
            held.drop(*ragged_ranges(np.maximum(low, end), high))
    held.runs = np.minimum(held.runs, end)
    held.move_to(lengths)
