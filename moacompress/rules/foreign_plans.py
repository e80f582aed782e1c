"""Plans of other projects, read and written: DuoAttention's patterns of heads, and MoA's spans of query heads.

Sources: DuoAttention (arXiv 2410.10819) has a weight in [0, 1] for every KV head, in rows of layers, and one sink and one
window for all that are not full. MoA (arXiv 2406.14909) has `alpha + beta * N` tokens for every query head. What a form
cannot say is noted, never dropped in silence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from moacompress.core.errors import PlanError
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import MAX_ALPHA, SINKS, Rule
from moacompress.rules.windows import BETA_ONE, window

Matrix = Sequence[Sequence[float]]
THRESHOLD = 0.5
"""Weight from which on a KV head is full."""
MOA_SINK = 64
"""First tokens that MoA always keeps: its global block."""
MOA_LEAST = 64
"""Smallest window of a plan that is made of MoA's spans: one of its blocks."""


@dataclass(frozen=True)
class DuoPattern:
    """DuoAttention's choice of heads.

    Attributes:
        heads: weights of KV heads, `[layers][kv_heads]`; full from the threshold on.
        sink: first tokens that the others keep.
        recent: last tokens that they keep.
    """

    heads: Matrix
    sink: int
    recent: int


@dataclass(frozen=True)
class MoaSpans:
    """MoA's spans: a query head sees its last `alphas + betas * N` tokens of N.

    Attributes:
        alphas: tokens, `[layers][heads]`; they may be negative.
        betas: shares of N.
    """

    alphas: Matrix
    betas: Matrix


def plan_of_duo(pattern: DuoPattern, shape: ModelShape, sparsity: float | None = None) -> tuple[Plan, list[str]]:
    """Returns the plan of a pattern, and what it does not say as the pattern did.

    `sparsity` is the share of the KV heads that are not full, those of least weight; by default those below `THRESHOLD`.

    Raises:
        PlanError: a pattern of another shape, or numbers that are none, or out of range.
    """
    weights = _matrix(pattern.heads, shape.layers, shape.kv_heads, "weights")
    if pattern.recent < 1 or pattern.recent > MAX_ALPHA or pattern.sink < 0:
        raise PlanError(
            f"a sink of {pattern.sink} and a window of {pattern.recent} tokens are not ones that heads can have"
        )
    if sparsity is None:
        streaming = weights < THRESHOLD
    elif 0 <= sparsity <= 1:
        order = np.argsort(weights, axis=None, kind="stable")[: round(sparsity * weights.size)]
        streaming = np.isin(np.arange(weights.size), order).reshape(weights.shape)
    else:
        raise PlanError(f"a sparsity of {sparsity:g} is no share of the heads, 0 to 1")
    sink, notes = _nearest_sink(pattern.sink)
    rule = Rule(sink, pattern.recent, 0)
    rules = tuple(tuple(rule if each else Rule.FULL for each in row) for row in streaming)
    least = _min_window(pattern.recent)
    if pattern.recent < least and streaming.any():
        notes.append(f"its window of {pattern.recent} tokens is one of {least} here, the smallest that there is")
    return Plan(shape, least, rules), notes


def duo_of_plan(plan: Plan) -> tuple[DuoPattern, list[str]]:
    """Returns the pattern of a plan, and what it cannot say.

    The most common of the fixed windows is that of the pattern; heads that have another one are full in it.
    """
    _refuse_sharing(plan, "DuoAttention")
    fixed = [(rule.sink, rule.alpha) for row in plan.rules for rule in row if not rule.sees_all and not rule.beta_q]
    common = max(sorted(set(fixed)), key=fixed.count) if fixed else (SINKS[-1], 256)

    def streams(rule: Rule) -> bool:
        return not rule.sees_all and not rule.beta_q and (rule.sink, rule.alpha) == common

    heads = [[0.0 if streams(rule) else 1.0 for rule in row] for row in plan.rules]
    grown = sum(not rule.sees_all and not streams(rule) for row in plan.rules for rule in row)
    notes = [f"{grown} KV heads with other windows are full in it"] if grown else []
    return DuoPattern(heads, common[0], max(common[1], plan.min_window)), [*notes, *_lost(plan)]


def plan_of_moa(spans: MoaSpans, shape: ModelShape, length: int) -> tuple[Plan, list[str]]:
    """Returns the plan of MoA's spans, and what it does not say as they did.

    A KV head gets the largest span of its query heads at `length` tokens. A negative alpha becomes less growth, so that the
    span is the same at that length.

    Raises:
        PlanError: spans of another shape, or numbers that are none.
    """
    alphas = _matrix(spans.alphas, shape.layers, shape.heads, "alphas")
    betas = _matrix(spans.betas, shape.layers, shape.heads, "betas")
    grouped = (shape.layers, shape.kv_heads, shape.heads // shape.kv_heads)
    members = np.stack((alphas, betas), -1).reshape(*grouped, 2)
    widest = (members[..., 0] + members[..., 1] * length).argmax(-1)
    chosen = np.take_along_axis(members, widest[..., None, None], 2)[:, :, 0]  # [layers, kv_heads, 2]
    rules = tuple(tuple(_elastic(float(alpha), float(beta), length) for alpha, beta in row) for row in chosen)
    differing = int((members != members[:, :, :1]).any((2, 3)).sum())
    bent = int((chosen[..., 0] < 0).sum())
    at = f"{length:,} tokens"
    notes = (
        [f"{differing} KV heads have query heads of different spans, and get the largest at {at}"] if differing else []
    )
    if bent:
        notes.append(
            f"{bent} spans have a negative alpha: they are the same at {at}, larger at shorter ones and smaller at longer ones"
        )
    narrow = sum(window(length, rule.alpha, rule.beta_q, 0) < MOA_LEAST for rule in chain(*rules) if not rule.sees_all)
    if narrow:
        notes.append(f"windows of {narrow} KV heads are smaller at {at} than {MOA_LEAST} tokens, and have so many here")
    return Plan(shape, MOA_LEAST, rules), notes


def moa_of_plan(plan: Plan) -> tuple[MoaSpans, list[str]]:
    """Returns MoA's spans of a plan, and what they cannot say."""
    _refuse_sharing(plan, "MoA")
    groups = plan.model.heads // plan.model.kv_heads
    rules = [rule for row in plan.rules for rule in row]
    spans = [(0.0, 1.0) if rule.sees_all else (float(rule.alpha), rule.beta_q / BETA_ONE) for rule in rules]
    table = np.array(spans).reshape(plan.model.layers, plan.model.kv_heads, 2).repeat(groups, 1)
    others = sum(not rule.sees_all and rule.sink != MOA_SINK for rule in rules)
    notes = [f"{others} KV heads have another sink than {MOA_SINK} tokens, which is MoA's"] if others else []
    least = plan.min_window
    small = sum(not rule.sees_all and rule.alpha < least for rule in rules)
    if small:
        notes.append(f"windows of {small} KV heads may be smaller there than the plan's smallest, {least} tokens")
    return MoaSpans(table[..., 0].tolist(), table[..., 1].tolist()), [*notes, *_lost(plan)]


def _elastic(alpha: float, beta: float, length: int) -> Rule:
    if beta >= 1 and alpha >= 0:
        return Rule.FULL
    if alpha < 0:
        alpha, beta = 0.0, max(0.0, alpha / length + beta)
    return Rule(MOA_SINK, math.ceil(min(alpha, MAX_ALPHA)), math.ceil(min(beta, 1.0) * BETA_ONE))


def _lost(plan: Plan) -> list[str]:
    rules = [rule for row in plan.rules for rule in row]
    coded, selecting = sum(not rule.is_native for rule in rules), sum(rule.selects for rule in rules)
    notes = [f"the formats of {coded} KV heads are left out: all is native in it"] if coded else []
    return [*notes, *([f"what the gates of {selecting} KV heads select is left out"] if selecting else [])]


def _refuse_sharing(plan: Plan, form: str) -> None:
    if plan.shares:
        raise PlanError(
            f"the plan's layers share attention, of which {form} knows nothing; use a plan that does not share"
        )


def _nearest_sink(sink: int) -> tuple[int, list[str]]:
    ours = next((known for known in SINKS if known >= sink), SINKS[-1])
    return ours, [f"its sink of {sink} tokens is one of {ours} here"] if ours != sink else []


def _min_window(recent: int) -> int:
    return next((known for known in (64, 32) if known <= recent), 16)


def _matrix(rows: Matrix, layers: int, heads: int, what: str) -> np.ndarray:
    try:
        found = np.asarray(rows, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise PlanError(f"its {what} are no table of numbers: {error}") from error
    if found.shape != (layers, heads):
        raise PlanError(f"its {what} are of shape {found.shape}; the model has {layers} layers of {heads} heads")
    if not np.isfinite(found).all():
        raise PlanError(f"some of its {what} are not finite")
    return found
