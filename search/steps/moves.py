"""Measured moves: the surrogate is least sure about the KV heads nearest the threshold, so those are tried on the model.

Every move is one KV head with its next best rule, measured alone under the plan at hand; a small knapsack of what was
measured then says which of them to make together. They are measured on calibration samples, so that the validation samples,
which decide whether the result is better, have not chosen it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moacompress.core.arrays import Floats, Ints
from moacompress.search.measure.trials import log_ratios
from moacompress.search.problem.knapsack import Knapsack
from moacompress.search.problem.solver import best_prices, solve
from moacompress.search.search_context import Incumbent, SearchContext

CAUTIONS = (1.0, 0.0)
"""Standard errors that a move must pay for; the later ones are tried where the earlier ones do not help."""


def make_moves(incumbent: Incumbent, context: SearchContext) -> Incumbent:
    """Measures single KV heads near the threshold and makes the moves that pay together."""
    count, trainer = context.request.recipe.search.moves, context.trainer
    if not count or trainer is None or context.deadline.over():
        return incumbent
    space = context.request.space(incumbent.plan.shares)
    choice = space.choice(incumbent.plan)
    moves = marginal_moves(space.knapsack, context.changes(incumbent), choice, count)
    plans = [incumbent.plan, *(space.plan(move.on(choice)) for move in moves)]
    context.progress.start("measuring moves", trainer.size)
    kls = context.evaluator.together(
        [context.evaluator.near("moves", number, plans, incumbent.plan, trainer) for number in range(trainer.size)],
        lambda done: context.progress.step(),
    )
    context.progress.done()
    ratios = np.array([log_ratios(column[1:], column[:1] * len(moves)) for column in kls]).T
    for caution in CAUTIONS if moves else ():
        plan = space.plan(combined(space.knapsack, choice, moves, ratios, caution))
        if plan.key() == incumbent.plan.key():
            continue
        found = context.measured(incumbent, plan, "moves")
        kept = found.kl < incumbent.kl
        context.add_stage("moves", found, kept, incumbent.kls)
        if kept:
            return found
    return incumbent


@dataclass(frozen=True)
class Move:
    """One KV head with another rule; where layers share, one group of KV heads.

    Attributes:
        layer: its layer, or the number of the group.
        head: its KV head, or 0.
        rule: number of the new rule.
    """

    layer: int
    head: int
    rule: int

    def on(self, choice: Ints) -> Ints:
        """Returns the choice with the move made."""
        changed = choice.copy()
        changed[self.layer, self.head] = self.rule
        return changed


def marginal_moves(knapsack: Knapsack, costs: Floats, choice: Ints, count: int) -> list[Move]:
    """Returns the moves that are predicted to matter least: `count` that take bytes, and as many that give some back.

    Those of each kind are of different KV heads. The costs are predicted KL of every rule, or its change, `[layers, kv_heads,
    rules]`; only differences count. The choice is the present one, `[layers, kv_heads]`.
    """
    rules = costs.shape[-1]
    flat = (costs - costs.min(axis=-1, keepdims=True)).reshape(-1, rules)
    sizes = knapsack.sizes.reshape(len(knapsack.limits), -1, rules)
    shares = sizes / np.maximum(knapsack.limits, 1)[:, None, None]
    reduced = flat + np.tensordot(best_prices(flat, shares)[0], shares, axes=1)
    heads = np.arange(len(flat))
    now = choice.reshape(-1)
    lost = reduced - reduced[heads, now][:, None]
    added = (sizes - sizes[:, heads, now][:, :, None])[-1]
    may = knapsack.may(now, 2 * count)
    moves = []
    for kind in (added > 0, added < 0):
        candidates = np.where(kind & may, lost, np.inf)
        rule = np.argmin(candidates, axis=1)
        least = candidates[heads, rule]
        order = [head for head in np.argsort(least, kind="stable")[:count].tolist() if np.isfinite(least[head])]
        moves += [Move(head // choice.shape[1], head % choice.shape[1], int(rule[head])) for head in order]
    return moves


def combined(knapsack: Knapsack, choice: Ints, moves: Sequence[Move], ratios: Floats, caution: float = 1.0) -> Ints:
    """Returns the choice, `[layers, kv_heads]`, with the best of the moves made, together within the limits.

    The ratios are the measured log-ratio of the KL after a move to that before, `[moves, samples]`. A move counts by its
    mean plus `caution` standard errors: what looks best of many noisy numbers is usually less good.
    """
    error = ratios.std(axis=1, ddof=1) / np.sqrt(ratios.shape[1]) if ratios.shape[1] > 1 else 0.0
    worth = ratios.mean(axis=1) + caution * error
    heads = sorted({(move.layer, move.head) for move in moves})
    options = {head: [int(choice[head])] for head in heads}
    worths: dict[tuple[int, int], list[float]] = {head: [0.0] for head in heads}
    for move, value in zip(moves, worth.tolist(), strict=True):
        options[move.layer, move.head].append(move.rule)
        worths[move.layer, move.head].append(value)
    most = max(map(len, options.values()))
    rules = np.array([options[head] + options[head][:1] * (most - len(options[head])) for head in heads])
    costs = np.array([worths[head] + worths[head][:1] * (most - len(worths[head])) for head in heads])
    where = np.array(heads).T
    sizes = np.stack([table[where[0][:, None], where[1][:, None], rules] for table in knapsack.sizes])
    used = np.take_along_axis(knapsack.sizes, choice[None, ..., None], axis=-1).sum(axis=(1, 2, 3))
    left = knapsack.limits - used + sizes[:, :, 0].sum(axis=1)
    picked = solve(costs - costs.min(axis=1, keepdims=True), sizes, left).choice
    changed = choice.copy()
    changed[where[0], where[1]] = rules[np.arange(len(heads)), picked]
    return changed
