"""What a plan costs and keeps: shares of the dense bytes, bytes and bits by format, what gates select, attention's work."""

from __future__ import annotations

from collections import Counter

import numpy as np

from moacompress.core.arrays import Floats, Ints
from moacompress.rules.budget import Budget
from moacompress.rules.formats import find_format
from moacompress.rules.kv_bytes import dense_kv_bytes, kv_bytes
from moacompress.rules.plan import Plan
from moacompress.rules.windows import BLOCK

AT_ONCE = 1 << 20
"""Numbers of tokens that are counted at a time."""


def chosen_share(plan: Plan, n: int) -> dict[str, float]:
    """Returns what gates select at `n` tokens: `kv_heads` that have one at work, and the `share` of all kept tokens."""
    kept, selected, heads = 0, 0, 0
    for row, native in zip(plan.rules, plan.model.native_windows, strict=True):
        for rule in row:
            whole = rule.kept(n, plan.min_window, native)
            kept += whole
            selected += whole - rule.without_choice().kept(n, plan.min_window, native)
            heads += rule.selects
    return {"kv_heads": heads, "share": selected / kept}


def holds_from(plan: Plan) -> int | None:
    """Returns the fewest tokens from which a plan is within its budget, as a share of the dense bytes, up to where that counts.

    Below them windows and sinks hold nearly everything. It is counted in whole blocks of the cache. None where the plan's notes
    ask for no share, or it is not within it.
    """
    budgets = map(Budget.parse, plan.budget.get("asked", ()))
    asked = [budget for budget in budgets if budget.share is not None]
    found = [_holds_from(plan, budget.share or 0.0, budget.length or min(plan.profiled_lengths)) for budget in asked]
    return max((n for n in found if n is not None), default=None) if None not in found else None


def _holds_from(plan: Plan, share: float, n: int) -> int | None:
    lengths = np.arange(n, 0, -BLOCK, dtype=np.int64)
    beyond = np.flatnonzero(kv_shares(plan, lengths) > share)
    within = int(beyond[0]) if len(beyond) else len(lengths)
    return int(lengths[within - 1]) if within else None


def kv_shares(plan: Plan, lengths: Ints) -> Floats:
    """Returns the cache's bytes as a share of the dense model's at many numbers of tokens, as `Plan.kv_share` at one."""
    kept = kv_bytes(plan.model, plan.rules, plan.min_window, lengths, plan.shares)
    return np.asarray(kept / dense_kv_bytes(plan.model, lengths))


def kept_bits(plan: Plan, n: int) -> dict[str, float]:
    """Returns the bits that a number of the keys and of the values takes at `n` tokens, mean over the kept tokens.

    Scales and zero points are counted, so that `int4` with 64 numbers a vector has 4.5.
    """
    shape, kept, bits = plan.model, {"keys": 0, "values": 0}, {"keys": 0.0, "values": 0.0}
    for layer, (row, native) in enumerate(zip(plan.rules, shape.native_windows, strict=True)):
        for rule in row:
            tokens = int(rule.kept(n, plan.min_window, native))
            for side, name in (("keys", rule.key_format), ("values", rule.value_format)):
                if side == "keys" and plan.share(layer) is not None:  # they are the anchor's
                    continue
                kept[side] += tokens
                bits[side] += tokens * 8 * find_format(name).vector_bytes(shape.head_dim, shape.dtype) / shape.head_dim
    return {side: total / kept[side] for side, total in bits.items()}


def format_rows(plan: Plan, n: int) -> list[dict[str, str | int]]:
    """Returns for each pair of formats how many KV heads have it, and the bytes that they take at `n` tokens.

    Rows have `key_format`, `value_format`, `kv_heads` and `kv_bytes`; the pair that takes most comes first.
    """
    heads, taken = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for row, sizes in zip(plan.rules, plan.head_bytes(n), strict=True):
        for rule, size in zip(row, sizes, strict=True):
            heads[rule.key_format, rule.value_format] += 1
            taken[rule.key_format, rule.value_format] += size
    return [
        {"key_format": keys, "value_format": values, "kv_heads": heads[keys, values], "kv_bytes": size}
        for (keys, values), size in sorted(taken.items(), key=lambda item: (-item[1], item[0]))
    ]


def attention_flops(plan: Plan, n: int) -> dict[str, int]:
    """Returns the floating-point operations of attention's two matrix products at batch 1, a multiply-add as two.

    `prefill` is of all queries of `n` tokens, `decode` of the n-th token's query.
    """
    shape = plan.model
    each = 4 * shape.head_dim * (shape.heads // shape.kv_heads)
    heads = Counter(
        (rule, native) for row, native in zip(plan.rules, shape.native_windows, strict=True) for rule in row
    )
    prefill = decode = 0
    for begin in range(1, n + 1, AT_ONCE):
        lengths = np.arange(begin, min(begin + AT_ONCE, n + 1), dtype=np.int64)
        for (rule, native), count in heads.items():
            prefill += count * int(np.sum(rule.kept(lengths, plan.min_window, native)))
    for (rule, native), count in heads.items():
        decode += count * int(rule.kept(n, plan.min_window, native))
    return {"prefill": each * prefill, "decode": each * decode}
