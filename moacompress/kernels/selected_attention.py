"""Attention of a step over the tokens that gates select.

Their blocks are read with the backend's `decode`, a KV head of a row at a time; `reference.transient.merged` puts it together
with that over sinks and windows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moacompress.core.arrays import Ints
from moacompress.kernels.arguments import CacheView, Scores, as_tensors
from moacompress.kernels.dispatch import backend_with_gradients
from moacompress.kernels.reference.transient import PartOfSoftmax
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable


def attend_selected(query: Tensor, cache: CacheView, counts: Ints, rules: RuleTable, scores: Scores) -> PartOfSoftmax:
    """Attention of one query a row, `[rows, heads, head_dim]`, over the tokens that gates select of it.

    They lie from the first place of their blocks on, and `counts` says how many they are, `[rows, kv_heads]`: 0 for a row that
    is not asked for. The cache says how many numbers a value has. Learned logits are no part of this.
    """
    rows, heads, size = query.shape
    group = heads // len(rules)
    wide = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(rows, len(rules), group, cache.value_dim)
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
        table = cache.table[row, head][:, None]
        full = RuleTable.of([Rule.FULL], 1)
        full.format_codes[:, 0] = formats
        few = asking[at]
        found, denominator = backend_with_gradients(few, *cache.keys, *cache.values, cached=True).decode(
            few,
            cache=CacheView(cache.keys, cache.values, table.contiguous(), cache.value_dim),
            lengths=torch.from_numpy(counts[row, head].astype(np.int64)),
            rules=as_tensors(full),
            scores=scores._replace(sink_logits=None),
            with_lse=True,
        )
        assert denominator is not None
        out[at], lse[at] = found.to(out.dtype), denominator.to(wide)
    return out.view(rows, heads, -1), lse.view(rows, heads)
