"""From costs of rules to a plan within a budget, and the plans that single choices make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from moacompress.core.arrays import Floats, Ints
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.share import LayerShares, with_shared_rules
from moacompress.search.problem.classes import ClassLimit, Mask
from moacompress.search.problem.solver import fill, solve
from moacompress.search.sharing.head_groups import HeadGroups

if TYPE_CHECKING:
    from moacompress.calibration.profile.store import Profile

Pick = tuple[int, int, int]
"""`(layer, kv_head, rule)`."""


@dataclass(frozen=True)
class Knapsack:
    """A budget for a profile's rules, ready for the solver.

    Attributes:
        sizes: what every rule takes of each limit, int64 [limits, layers, kv_heads, rules].
        limits: the most of each, int64 [limits].
        classes: how many different rules there may be, or None for any number.
        forbidden: rules that a KV head may not have, bool [layers, kv_heads, rules], or None. They take what the first does.
    """

    sizes: Ints
    limits: Ints
    classes: ClassLimit | None = None
    forbidden: Mask | None = None

    def choose(self, costs: Floats) -> Ints:
        """Returns the rule of every KV head of least total cost, int64 [layers, kv_heads]; costs have the rules last."""
        count, layers, kv_heads, rules = self.sizes.shape
        if self.forbidden is not None:  # dearer than the first rule, and no smaller
            costs = np.where(self.forbidden, costs[..., :1] + np.ptp(costs) + 1e-9, costs)
        costs, sizes = costs.reshape(-1, rules), self.sizes.reshape(count, -1, rules)
        if self.classes is None:
            choice = solve(costs, sizes, self.limits).choice
        else:
            choice = self.classes.solve(costs, sizes, self.limits)
        return choice.reshape(layers, kv_heads)

    def filled(self, costs: Floats, choice: Ints) -> Ints:
        """Returns the choice with what it leaves of the limits spent: rules that take no less of any, and cost no more."""
        count, layers, kv_heads, rules = self.sizes.shape
        sizes = self.sizes.reshape(count, -1, rules)
        found = fill(choice.reshape(-1), costs.reshape(-1, rules), sizes, self.limits, grow=True, may=self.may)
        return found.reshape(layers, kv_heads)

    def may(self, choice: Ints, changes: int = 1) -> Mask:
        """Returns which rules the rows may take where so many change at once, bool `[rows, rules]`; the choice is `[rows]`."""
        rules = self.sizes.shape[-1]
        found = np.ones((len(choice), rules), bool) if self.classes is None else self.classes.may(choice, changes)
        return found if self.forbidden is None else found & ~self.forbidden.reshape(-1, rules)

    def merged(self, groups: HeadGroups) -> Knapsack:
        """Returns the knapsack of groups of rows that have one rule."""
        count, rules = len(self.sizes), self.sizes.shape[-1]
        sizes = groups.summed(self.sizes.reshape(count, -1, rules))[:, :, None]
        classes = None if self.classes is None else self.classes.merged(groups)
        forbidden = None if self.forbidden is None else groups.any_of(self.forbidden)[:, None]
        return replace(self, sizes=sizes, classes=classes, forbidden=forbidden)


def total_cost(costs: Floats, choice: Ints) -> float:
    """Returns the summed cost of a choice: costs [layers, kv_heads, rules], choice [layers, kv_heads]."""
    return float(np.take_along_axis(costs, choice[..., None], axis=-1).sum())


def chosen_plan(profile: Profile, choice: Ints, shares: LayerShares = ()) -> Plan:
    """Returns the plan of a choice of rules, whose layers share as given."""
    rows = tuple(tuple(profile.rules[number] for number in row) for row in choice.tolist())
    return _plan(profile, with_shared_rules(rows, shares), shares)


def _plan(profile: Profile, rows: Sequence[Sequence[Rule]], shares: LayerShares = ()) -> Plan:
    """Returns the plan of rules, with the profile's gates; in layers with a window of their own gates select nothing."""
    windows = profile.shape.native_windows
    own = [
        [rule if window is None else rule.without_choice() for rule in row]
        for row, window in zip(rows, windows, strict=True)
    ]
    return profile.plan(own, shares)


def choice_of(profile: Profile, plan: Plan) -> Ints:
    """Returns the number of every KV head's rule among the profile's, int64 `[layers, kv_heads]`."""
    index = {rule: number for number, rule in enumerate(profile.rules)}
    return np.array([[index[rule] for rule in row] for row in plan.rules], np.int64)


def ablation(profile: Profile, pick: Pick) -> Plan:
    """Returns the plan in which one KV head has a rule and all others keep everything."""
    layer, head, rule = pick
    rules = [[Rule.FULL] * profile.shape.kv_heads for _ in range(profile.shape.layers)]
    rules[layer][head] = profile.rules[rule]
    return _plan(profile, rules)
