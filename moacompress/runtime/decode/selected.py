"""Attention of a step over the tokens that gates select.

Their blocks are read with the backend's `decode`, a KV head of a row at a time; `kernels.reference.passing.merged` puts it
together with that over sinks and windows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moacompress.core.arrays import Ints
from moacompress.kernels.arguments import CacheView, Scores, as_tensors
from moacompress.kernels.dispatch import backend_with_gradients
from moacompress.kernels.reference.passing import PartOfSoftmax
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.runtime.cache.layer_blocks import LayerBlocks


def attend_selected(query: Tensor, held: LayerBlocks, lengths: Ints, scores: Scores) -> PartOfSoftmax:
    """Attention of one query a row over the tokens that gates select of it.

    Args:
        query: `[rows, heads, head_dim]`.
        held: the layer's blocks.
        lengths: tokens of the rows, `[rows]`; 0 for a row that is not asked for.
        scores: how scores are made; learned logits are no part of this.

    Returns:
        `[rows, heads, value_dim]`, and `[rows, heads]` in float32 at least.
    """
    rows, heads, size = query.shape
    rules, view = held.rules, held.view_selected()
    group, counts = heads // len(rules), rules.selected(lengths)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_zeros(rows, len(rules), group, view.value_dim or held.pool.layout.value_dim)
    lse = torch.full((rows, len(rules), group), -torch.inf, dtype=wide, device=query.device)
    asking = query.view(rows, len(rules), group, size)
    codes = np.asarray(rules.format_codes).T
    for formats in np.unique(codes, axis=0):
        members = np.flatnonzero((codes == formats).all(axis=1))
        row, place = np.nonzero(counts[:, members] > 0)
        if not len(row):
            continue
        head = members[place]
        at = tuple(torch.from_numpy(numbers).to(query.device) for numbers in (row, head))
        table = view.table[row, head][:, None]
        full = RuleTable.of([Rule.FULL], 1)
        full.format_codes[:, 0] = formats
        few = asking[at]
        found, denominator = backend_with_gradients(few, *view.keys, *view.values, cached=True).decode(
            few,
            cache=CacheView(view.keys, view.values, table.contiguous(), view.value_dim),
            lengths=torch.from_numpy(counts[row, head].astype(np.int64)),
            rules=as_tensors(full),
            scores=scores._replace(sink_logits=None),
            with_lse=True,
        )
        assert denominator is not None
        out[at], lse[at] = found.to(out.dtype), denominator.to(wide)
    return out.view(rows, heads, -1), lse.view(rows, heads)
