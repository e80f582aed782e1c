"""Attention over numbers that are not finite, in plain PyTorch: they reach the queries that see them, and no others.

A product with a mask's zero does not hide such a number, neither forward nor backward: 0 * NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


def attend_as_seen(
    together: Attention,
    alone: Attention,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sees: Callable[[int], torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """Attends so that what is not finite reaches the rows that see it, and no others.

    `together` is attention of all rows; it returns tensors `[..., group, rows]` or `[..., group, rows, dim]`, the output first,
    as this does. `alone` is the same for one row that sees all keys it is given. The query is `[..., group, rows, head_dim]`,
    keys and values are `[..., columns, dim]`. `sees` returns which keys a row sees, bool `[columns]`; of a row that sees none
    the output is not looked at.
    """
    found = together(query, keys, values)
    out = found[0]
    # what is not finite shows in the output, or in gradients; or it makes zeros: torch's fused attention of scores of -inf
    suspect = ~out.isfinite().all(-1) | ~out.any(-1)
    if not (out.requires_grad or bool(suspect.any())) or all(
        bool(tensor.isfinite().all()) for tensor in (query, keys, values)
    ):
        return found
    # zeros for what is not finite; what that makes wrong is made again, each row of what it sees alone
    nonfinite_query = ~query.isfinite().all(-1)
    nonfinite_key, nonfinite_value = ~keys.isfinite().all(-1), ~values.isfinite()
    dim = query.ndim - 2
    finite = (torch.where(tensor.isfinite(), tensor, 0) for tensor in (query, keys, values))
    apart = [list(tensor.unbind(dim)) for tensor in together(*finite)]
    for row in range(query.shape[dim]):
        seen = sees(row).nonzero()[:, 0]
        weights = nonfinite_query[..., row] | nonfinite_key[..., seen].any(-1, keepdim=True)
        numbers = weights[..., None] | nonfinite_value[..., seen, :].any(-2, keepdim=True)
        if not len(seen) or not bool(numbers.any()):
            continue
        exact = alone(query.narrow(dim, row, 1), keys.index_select(-2, seen), values.index_select(-2, seen))
        for rows, tensor in zip(apart, exact, strict=True):
            one = tensor.select(dim, 0)
            rows[row] = torch.where(weights if one.ndim == weights.ndim else numbers, one, rows[row])
    return tuple(torch.stack(rows, dim) for rows in apart)
