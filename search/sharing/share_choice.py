"""The layers that a search lets share: those named by hand, a given number, or as many as a trial's search parameter says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np

from moacompress.calibration.profile.store import Profile
from moacompress.core.arrays import Floats
from moacompress.core.errors import UsageError
from moacompress.recipe import Recipe
from moacompress.repair.copies import CopyRepair
from moacompress.repair.projections import Weights
from moacompress.rules.asked_shares import AskedShares
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.rule import Rule
from moacompress.rules.share import LayerShares, Share, check_shares
from moacompress.search.sharing.copy_costs import CopyCosts

PROTECTED = 2
"""First layers that share only where they are named by hand: every later layer builds on what they attend to, so their copies
cost far more KL than the second order, which holds for small changes, predicts. They may be anchors."""

REPAIRED = 2
"""Copies of each layer that are repaired before the choice, where that is asked for: those predicted to be cheapest."""

Anchors: TypeAlias = Mapping[int, int]
"""The anchor of every layer that copies, by layer."""
GAP = 1e-9
"""Relative gap at which the mixed-integer programme of anchors is called solved."""
HOPE = 3.0
"""How many times the KL that they avoid copies may be predicted to cost, for trials to measure whether that is so."""


@dataclass(frozen=True, eq=False)
class ShareChoice:
    """What a search may share.

    Attributes:
        costs: of copies, as they were profiled, less what a repair takes off.
        asked: what is to be shared.
        shape: of the model.
        repairs: of the copies that were repaired, by layer and anchor; `costs` count what is left.
    """

    costs: CopyCosts
    asked: AskedShares
    shape: ModelShape
    repairs: Mapping[tuple[int, int], CopyRepair] = field(default_factory=dict)

    @staticmethod
    def of(profile: Profile, recipe: Recipe) -> ShareChoice | None:
        """Returns the choice that a recipe asks for; None where no layer is to share.

        Raises:
            UsageError: a profile that does not say what is needed, a layer that the model does not have, or more layers than
                can share.
            PlanError: layers that cannot share.
        """
        asked = AskedShares.parse(recipe.search.share)
        if asked.off:
            return None
        found = ShareChoice(CopyCosts.of(profile), asked, profile.shape)
        found.shares(1 if asked.auto else 0)
        return found if asked.auto or found.fixed else None

    @cached_property
    def fixed(self) -> LayerShares:
        """The shares of every plan; none where trials choose them."""
        if self.asked.auto:
            return ()
        return self._by_hand() if self.asked.pairs else self.shares(self.asked.count or 0)

    def shares(self, count: int) -> LayerShares:
        """Returns so many copies of lowest predicted KL.

        Raises:
            UsageError: there cannot be so many.
        """
        if not count:
            return ()
        found = self._anchors(count)
        if found is None:
            raise UsageError(
                f"{count} layers cannot share: of {self.shape.layers} the first {PROTECTED} are left alone, and an anchor is "
                f"one of the {self.costs.anchors} layers before, has the same sliding window and shares nothing itself"
                "; ask for fewer, or profile again with more --anchors"
            )
        return self._made(found[1])

    def copies(self) -> list[tuple[int, Share]]:
        """Returns the copies that are worth repairing: those asked for by name, or each layer's `REPAIRED` cheapest."""
        if self.asked.pairs:
            return [(layer, share) for layer, share in enumerate(self.fixed) if share is not None]
        found = []
        for layer, costs in enumerate(self._table):
            cheapest = [index for index in np.argsort(costs, kind="stable")[:REPAIRED] if np.isfinite(costs[index])]
            found += [(layer, self.costs.share(layer, layer - 1 - int(index))) for index in cheapest]
        return found

    def repaired(self, copies: Sequence[tuple[int, Share]], repairs: Sequence[CopyRepair]) -> ShareChoice:
        """Returns the choice among copies of which some were repaired."""
        left = np.ones_like(self.costs.may, np.float64)
        held = {}
        for (layer, share), one in zip(copies, repairs, strict=True):
            left[layer, layer - 1 - share.anchor] = one.left
            held[layer, share.anchor] = one
        return replace(self, costs=self.costs.less(left), repairs=held)

    def weights(self, shares: LayerShares) -> Weights:
        """Returns the repaired weights of the copies among some shares, as far as they were repaired."""
        found: Weights = {}
        for layer, share in enumerate(shares):
            if share is not None and (layer, share.anchor) in self.repairs:
                found.update(self.repairs[layer, share.anchor].weights)
        return found

    def most(self, saved: Callable[[LayerShares], float]) -> int:
        """Returns how many layers a trial may let share, at least 1.

        There are more as long as all copies cost no more than `HOPE` times their gain. `saved` returns the KL that the bytes of
        the keys that some shares save are predicted to avoid, nats.
        """
        most = 1
        while most < self.shape.layers // 2:
            found = self._anchors(most + 1)
            if found is None or found[0] > HOPE * saved(self._made(found[1])):
                break
            most += 1
        return most

    def _anchors(self, count: int) -> tuple[float, Anchors] | None:
        if count not in self._known:
            self._known[count] = cheapest_anchors(self._table, count)
        return self._known[count]

    @cached_property
    def _known(self) -> dict[int, tuple[float, Anchors] | None]:
        return {}

    @cached_property
    def _table(self) -> Floats:
        table = self.costs.table()
        table[:PROTECTED] = np.inf
        return table

    def _by_hand(self) -> LayerShares:
        layers, heads = self.shape.layers, tuple(range(self.shape.kv_heads))
        for layer, _ in self.asked.pairs:
            if layer >= layers:
                raise UsageError(f"layer {layer} is to share attention; the model has the layers 0 to {layers - 1}")
        named: list[Share | None] = [None] * layers
        for layer, anchor in self.asked.pairs:
            named[layer] = Share(anchor, heads)
        check_shares(self.shape, ((Rule.FULL,) * len(heads),) * layers, tuple(named))
        return self._made(dict(self.asked.pairs))

    def _made(self, anchors: Anchors) -> LayerShares:
        return tuple(
            self.costs.share(layer, anchors[layer]) if layer in anchors else None for layer in range(self.shape.layers)
        )


def cheapest_anchors(costs: Floats, count: int) -> tuple[float, Anchors] | None:
    """Returns the least cost of so many copying layers, and their anchors, none of which copies itself; None if impossible.

    `costs[layer, k]` is the cost of a layer with the anchor `layer - 1 - k`, infinity where it may not be.
    """
    from scipy import optimize, sparse

    layer, index = np.nonzero(np.isfinite(costs))
    if count == 0:
        return 0.0, {}
    if not len(layer):
        return None
    of_pairs = costs[layer, index]
    anchor, pairs = layer - 1 - index, np.arange(len(layer))
    copies = sparse.csr_array((np.ones(len(pairs)), (layer, pairs)), shape=(len(costs), len(pairs)))
    # one row a pair: it is there, or its anchor copies, or neither
    chains = sparse.csr_array(copies[anchor] + sparse.identity(len(pairs), format="csr"))
    scale = float(of_pairs.max()) or 1.0
    found = optimize.milp(
        of_pairs / scale,
        constraints=[
            optimize.LinearConstraint(copies, -np.inf, 1),
            optimize.LinearConstraint(chains, -np.inf, 1),
            optimize.LinearConstraint(np.ones((1, len(pairs))), count, count),
        ],
        integrality=np.ones(len(pairs)),
        bounds=optimize.Bounds(0, 1),
        options={"mip_rel_gap": GAP},
    )
    if found.x is None:
        return None
    chosen = found.x > 0.5
    total = float(of_pairs[chosen].sum())
    return total, dict(sorted(zip(layer[chosen].tolist(), anchor[chosen].tolist(), strict=True)))
