"""The plans that a search chooses among: those whose layers share in one way, within limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moacompress.calibration.profile.store import Profile
from moacompress.core.arrays import Floats, Ints
from moacompress.rules.kv_bytes import candidate_kv_bytes
from moacompress.rules.limits import below_floors, layer_floors, limit_array
from moacompress.rules.plan import Plan
from moacompress.rules.share import LayerShares
from moacompress.search.problem.classes import ClassLimit
from moacompress.search.problem.knapsack import Knapsack, choice_of, chosen_plan
from moacompress.search.problem.quadratic import Quadratic
from moacompress.search.sharing.head_groups import HeadGroups

if TYPE_CHECKING:
    from moacompress.search.search_request import SearchRequest


@dataclass(frozen=True, eq=False)
class PlanSpace:
    """The plans of one knapsack.

    A row of the knapsack is what has one rule. Without sharing it is a KV head, and tables are `[layers, kv_heads, rules]`.
    With copies it is a group of them, and tables are `[groups, 1, rules]`: sums over a group, whose bytes are the keys and
    values of the anchor's KV head and the values of its reuse layers.

    Attributes:
        profile: with the formats on offer.
        shares: of the layers of every plan.
        groups: None without sharing.
        knapsack: what the rows take, and its limits.
    """

    profile: Profile
    shares: LayerShares
    groups: HeadGroups | None
    knapsack: Knapsack

    @staticmethod
    def of(
        request: SearchRequest,
        shares: LayerShares = (),
        classes: int | None = None,
    ) -> PlanSpace:
        """Returns a request's plans whose layers share so, with at most so many classes, within its limits."""
        profile, search = request.profile, request.recipe.search
        limits = request.limits
        sizes = candidate_kv_bytes(profile.shape, profile.rules, profile.min_window, list(limits), shares)
        below = below_floors(sizes, layer_floors(search.floors, profile.shape))
        groups = HeadGroups.of(profile.shape, shares) if shares else None
        forbidden = below
        if groups is not None:  # a rule that one of a group may not have none of it may have
            of_groups = groups.any_of(below)
            below, forbidden = of_groups[groups.of_head], of_groups[:, None]
        few = None if classes is None else ClassLimit.of(classes, profile.shape, profile.rules, below, groups)
        sizes = np.where(below, sizes[..., :1], sizes)
        if groups is not None:
            sizes = groups.summed(sizes.reshape(len(sizes), -1, sizes.shape[-1]))[:, :, None]
        knapsack = Knapsack(sizes, limit_array(limits), few, forbidden)
        return PlanSpace(profile, shares, groups, knapsack)

    def costs(self, costs: Floats) -> Floats:
        """Returns the costs of the rows, from those of single KV heads, `[layers, kv_heads, rules]`."""
        return costs if self.groups is None else self.groups.summed(costs.reshape(-1, costs.shape[-1]))[:, None]

    def form(self, form: Quadratic) -> Quadratic:
        """Returns a quadratic form over the rows, from one over single KV heads."""
        return form if self.groups is None else form.merged(self.groups)

    def plan(self, choice: Ints) -> Plan:
        """Returns the plan of a choice of rules for the rows."""
        if self.groups is None:
            return chosen_plan(self.profile, choice)
        return chosen_plan(self.profile, self.groups.spread(choice[:, 0]), self.shares)

    def choice(self, plan: Plan) -> Ints:
        """Returns the number of every row's rule in a plan that shares in the same way."""
        choice = choice_of(self.profile, plan)
        return choice if self.groups is None else self.groups.gathered(choice)[:, None]
