"""What a rule costs in bytes of cache, exactly, and whether a budget can be met at all.

All numbers are integers from `moacompress.rules.rule_table`, so that the solver, the plan and the cache agree to the byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from moacompress.core.arrays import Floats, Ints
from moacompress.core.errors import BudgetError
from moacompress.rules.budget import Budget
from moacompress.rules.formats import find_format
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import MIN_WINDOWS, Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.share import LayerShares
from moacompress.rules.windows import BLOCK

Shares: TypeAlias = npt.NDArray[np.float64]
AT_ONCE = 1 << 20
"""Numbers of tokens that are counted at a time."""


def byte_table(
    shape: ModelShape, rules: Sequence[Rule], min_window: int, lengths: Sequence[int], shares: LayerShares = ()
) -> Ints:
    """Returns the bytes of cache that every KV head takes under every rule; those of a layer that shares are its values'.

    Args:
        shape: for layers, KV heads and native windows.
        rules: candidate rules.
        min_window: smallest window, tokens.
        lengths: tokens so far.
        shares: what each layer takes from an earlier one; empty for nothing.

    Returns:
        int64 [lengths, layers, kv_heads, rules].
    """
    n = np.array(lengths, np.int64)
    slots = {native: RuleTable.of(rules, min_window, native).slots(n) for native in set(shape.native_windows)}
    whole, values = (np.array([of(rule) for rule in rules], np.int64) for of in (shape.token_bytes, shape.value_bytes))
    layers = [
        slots[native] * (values if shares and shares[layer] is not None else whole)
        for layer, native in enumerate(shape.native_windows)
    ]
    return np.repeat(np.stack(layers, axis=1)[:, :, None, :], shape.kv_heads, axis=2)


def layer_floors(floors: Mapping[int, float], shape: ModelShape) -> Shares:
    """Returns the smallest share of its KV bytes that every layer keeps, float64 [layers]; 0 where none is asked for.

    Raises:
        BudgetError: a layer that the model does not have.
    """
    found = np.zeros(shape.layers)
    for layer, share in floors.items():
        if layer >= shape.layers:
            raise BudgetError(
                f"a floor is asked for in layer {layer}; the model has the layers 0 to {shape.layers - 1}"
            )
        found[layer] = share
    return found


def floored(sizes: Ints, floors: Shares) -> Ints:
    """Returns the bytes with every rule that keeps less than its layer's floor standing for the full rule.

    Args:
        sizes: bytes, [lengths, layers, kv_heads, rules], the full rule first.
        floors: [layers].
    """
    return np.where(below_floors(sizes, floors), sizes[..., :1], sizes)


def below_floors(sizes: Ints, floors: Shares) -> npt.NDArray[np.bool_]:
    """Returns whether a rule keeps less than its layer's floor at some length, [layers, kv_heads, rules]; see `floored`."""
    return np.asarray((sizes < np.ceil(floors[:, None, None] * sizes[..., :1])).any(axis=0))


def meets(plan: Plan, floors: Shares, lengths: Iterable[int]) -> bool:
    """Returns whether every KV head keeps at least its layer's floor, [layers], at every length."""
    full = plan.model.token_bytes(Rule.FULL)
    for row, native, floor in zip(plan.rules, plan.model.native_windows, floors, strict=True):
        for n in lengths if floor else ():
            least = floor * Rule.FULL.slots(n, plan.min_window, native) * full
            if any(rule.slots(n, plan.min_window, native) * plan.model.token_bytes(rule) < least for rule in row):
                return False
    return True


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

    Below them windows and sinks hold nearly everything. It is counted in whole blocks of the cache.

    Args:
        plan: its notes name the budget and the lengths that it was searched for.

    Returns:
        None where no share was asked for, or the plan is not within it.
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
    shape, held = plan.model, Counter[tuple[Rule, int | None, int]]()
    for layer, (row, native) in enumerate(zip(plan.rules, shape.native_windows, strict=True)):
        size = shape.token_bytes if plan.share(layer) is None else shape.value_bytes
        held.update((rule, native, size(rule)) for rule in row)
    dense = Counter(shape.native_windows)
    full = shape.kv_heads * shape.token_bytes(Rule.FULL)
    kept = sum(
        count * size * rule.slots(lengths, plan.min_window, native) for (rule, native, size), count in held.items()
    )
    whole = sum(count * full * Rule.FULL.slots(lengths, MIN_WINDOWS[0], native) for native, count in dense.items())
    return np.asarray(kept / whole)


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


def bytes_by_formats(plan: Plan, n: int) -> dict[tuple[str, str], tuple[int, int]]:
    """Returns how many KV heads have each pair of formats of keys and values, and the bytes that they take at `n` tokens.

    The pair that takes most comes first.
    """
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for row, sizes in zip(plan.rules, plan.head_bytes(n), strict=True):
        for rule, size in zip(row, sizes, strict=True):
            heads, taken = found.get((rule.key_format, rule.value_format), (0, 0))
            found[rule.key_format, rule.value_format] = heads + 1, taken + size
    return dict(sorted(found.items(), key=lambda item: (-item[1][1], item[0])))


def format_rows(plan: Plan, n: int) -> list[dict[str, str | int]]:
    """Returns `bytes_by_formats` as rows of `key_format`, `value_format`, `kv_heads` and `kv_bytes`."""
    return [
        {"key_format": keys, "value_format": values, "kv_heads": heads, "kv_bytes": taken}
        for (keys, values), (heads, taken) in bytes_by_formats(plan, n).items()
    ]


def attention_flops(plan: Plan, n: int) -> dict[str, int]:
    """Returns the floating-point operations of attention's two matrix products at batch 1, a multiply-add as two.

    Args:
        plan: the plan; its full plan gives the dense model's.
        n: tokens.

    Returns:
        `prefill`: of all queries of `n` tokens; `decode`: of the n-th token's query.
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


def smallest_bytes(
    shape: ModelShape,
    rules: Sequence[Rule],
    min_window: int,
    lengths: Sequence[int],
    floors: Shares | None = None,
    shares: LayerShares = (),
) -> dict[int, int]:
    """Returns the KV bytes of the smallest plan at each length.

    KV heads of different layers that are to have one rule may take more, where floors differ; the solver says so.

    Args:
        shape: the model.
        rules: candidate rules.
        min_window: smallest window, tokens.
        lengths: tokens.
        floors: smallest share that every layer keeps, [layers]; none by default.
        shares: what each layer takes from an earlier one.
    """
    table = byte_table(shape, rules, min_window, lengths, shares)
    smallest = (table if floors is None else floored(table, floors)).min(axis=-1).sum(axis=(1, 2))
    return {n: int(total) for n, total in zip(lengths, smallest, strict=True)}
