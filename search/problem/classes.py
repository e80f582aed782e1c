"""A limit on how many different rules a plan may have: which classes there are, and the rule of every KV head among them.

It is a facility location problem on top of the knapsack: of all rules on offer at most so many are opened, and every KV head
takes one of these. At given prices of bytes it is solved greedily and by exchange of single classes; then KV heads choose
among the open classes within the limits, exactly as they do among all rules, and that choice gives other prices. Sets of
classes near the end are compared by the choice that they really lead to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moacompress.core.arrays import Floats, Ints
from moacompress.core.errors import InfeasibleBudgetError
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.rule import Rule
from moacompress.rules.rule_classes import rule_class
from moacompress.search.problem.solver import best_prices, relaxed, solve
from moacompress.search.sharing.head_groups import HeadGroups

Mask = npt.NDArray[np.bool_]

MAX_EXCHANGES = 200
"""Exchanges of one class at given prices."""
MAX_ROUNDS = 8
"""Times that prices are found for the open classes, and classes for the prices."""
TRIED = 32
"""Exchanges of one class that are tried at the end."""
MAX_CLIMB = 12
"""Times that bytes are made dearer until classes are small enough for the limits."""


@dataclass(frozen=True, eq=False)
class ClassLimit:
    """How many classes a plan may have.

    Attributes:
        most: classes.
        labels: number of the class of every rule on every row of the knapsack, int64 `[..., rules]`; -1 where a row may not
            have the rule.
    """

    most: int
    labels: Ints

    @staticmethod
    def of(
        most: int, shape: ModelShape, rules: Sequence[Rule], forbidden: Mask, groups: HeadGroups | None
    ) -> ClassLimit | None:
        """Returns the limit of the rows of a knapsack; None where there are no more rows than classes.

        `forbidden` are rules that a KV head may not have, `[layers, kv_heads, rules]`. KV heads of a group have one rule and
        are one row.
        """
        number: dict[object, int] = {}
        of_window = {
            native: [number.setdefault(rule_class(rule, native), len(number)) for rule in rules]
            for native in dict.fromkeys(shape.native_windows)
        }
        labels = np.array([of_window[native] for native in shape.native_windows], np.int64)
        labels = np.where(forbidden, -1, np.repeat(labels[:, None], shape.kv_heads, axis=1))
        if groups is not None:  # all of a group have the same sliding window, and may have the same rules
            rows = np.empty((groups.size, labels.shape[-1]), np.int64)
            rows[groups.of_head.reshape(-1)] = labels.reshape(-1, labels.shape[-1])
            labels = rows[:, None]
        return ClassLimit(most, labels) if most < labels[..., 0].size else None

    @property
    def flat(self) -> Ints:
        """The labels with all rows in one axis, `[rows, rules]`."""
        return self.labels.reshape(-1, self.labels.shape[-1])

    def of_choice(self, choice: Ints) -> Ints:
        """Returns the label of every row's class, `[rows]`, of a choice of rules, `[rows]`."""
        found: Ints = self.flat[np.arange(len(choice)), choice]
        return found

    def may(self, choice: Ints, changes: int = 1) -> Mask:
        """Returns which rules `changes` rows may take at once, and the plan keep the limit: bool `[rows, rules]`.

        They are those of the classes that there are, and any where as many more classes may be opened. The choice is the
        present rule of every row, `[rows]`.
        """
        there = np.unique(self.of_choice(choice))
        if len(there) + changes <= self.most:
            return self.flat >= 0
        return np.isin(self.flat, there)

    def groups(self, choice: Ints) -> HeadGroups:
        """Returns the rows of every class as a group, of a choice of rules that has the shape of the knapsack's rows."""
        there, of_row = np.unique(self.of_choice(choice.reshape(-1)), return_inverse=True)
        return HeadGroups(of_row.reshape(choice.shape), len(there))

    def merged(self, groups: HeadGroups) -> ClassLimit:
        """Returns the labels of whole groups: a group may have a rule if all of its rows may. Their number is no limit."""
        labels = np.full((groups.size, self.labels.shape[-1]), np.iinfo(np.int64).max)
        np.minimum.at(labels, groups.of_head.reshape(-1), self.flat)
        return ClassLimit(groups.size, labels[:, None])

    def solve(self, costs: Floats, sizes: Ints, limits: Ints) -> Ints:
        """Returns the rule of every row of least total cost found, `[rows]`, of no more classes than the limit.

        Costs are at least 0, `[rows, rules]`, sizes bytes, `[lengths, rows, rules]`, limits the most of them, `[lengths]`.

        Raises:
            InfeasibleBudgetError: no choice of so few classes was found within the limits.
        """
        free = solve(costs, sizes, limits)
        labels = self.of_choice(free.choice)
        if (labels >= 0).all() and len(np.unique(labels)) <= self.most:
            return free.choice
        return _Columns.of(self, costs, sizes, limits).solved()


@dataclass(frozen=True, eq=False)
class _Columns:
    """The problem by class.

    Attributes:
        most: classes that may be open.
        rule: the rule by which every row takes part in a class, int64 `[rows, classes]`; -1 where it cannot.
        costs: `[rows, classes]`; infinity where a row cannot take part.
        sizes: bytes, `[lengths, rows, classes]`.
        limits: `[lengths]`.
    """

    most: int
    rule: Ints
    costs: Floats
    sizes: Ints
    limits: Ints

    @staticmethod
    def of(limit: ClassLimit, costs: Floats, sizes: Ints, limits: Ints) -> _Columns:
        """Returns the problem of a limit; see `ClassLimit.solve`."""
        labels = limit.flat
        rows = np.arange(len(labels))
        rule = np.full((len(labels), int(labels.max()) + 1), -1, np.int64)
        for number in reversed(range(labels.shape[1])):  # the first of those that are one class
            there = labels[:, number] >= 0
            rule[rows[there], labels[there, number]] = number
        of_class = np.where(rule < 0, np.inf, np.take_along_axis(costs, np.maximum(rule, 0), 1))
        in_class = np.take_along_axis(sizes, np.maximum(rule, 0)[None], 2)
        return _Columns(limit.most, rule, of_class, in_class, limits)

    def solved(self) -> Ints:
        """Returns the rule of every row, `[rows]`; see `ClassLimit.solve`."""
        every = np.arange(self.costs.shape[1])
        prices = self._prices(self._among(every))
        best: _Found | None = None
        opened: Ints | None = None
        for _ in range(MAX_ROUNDS):
            opened = self._exchanged(self._reduced(prices), opened)
            found = self._found(opened)
            if found is None and best is None:
                found = self._affordable(prices)
            if found is None or (best is not None and found.cost >= best.cost):
                break
            best, opened = found, found.opened
            prices = self._prices(found.among)
        assert best is not None
        best, rows = self._climbed(best), np.arange(len(self.rule))
        solution = solve(*self._tables(best.among), self.limits)
        return np.asarray(self.rule[rows, best.among[rows, solution.choice]])

    def _climbed(self, best: _Found) -> _Found:
        """Returns the end of a local search by exchanges of one class, each of which really leads to a better choice.

        At given prices the exchanges that seem to gain most are tried: with few classes a choice seldom spends all of its
        bytes, and prices say little of that.
        """
        for _ in range(MAX_ROUNDS):
            prices = self._prices(best.among)
            gains = self._gains(_finite(self._reduced(prices)), best.opened.tolist())
            gains[:, best.opened] = -np.inf
            better = None
            for exchange in np.argsort(-gains, axis=None, kind="stable")[:TRIED].tolist():
                place, new = divmod(exchange, gains.shape[1])
                opened = best.opened.copy()
                opened[place] = new
                found = self._found(np.sort(opened), prices)
                if found is not None and found.cost < (better or best).cost * (1 - 1e-9):
                    better = found
            if better is None:
                break
            best = better
        return best

    def _affordable(self, prices: Floats) -> _Found:
        """Returns the choice among the first classes that are small enough for the limits, as bytes get dearer.

        Raises:
            InfeasibleBudgetError: the smallest that are found are too large.
        """
        for step in range(1, MAX_CLIMB + 1):
            found = self._found(self._exchanged(self._reduced(prices * 2.0**step), None))
            if found is not None:
                return found
        bytes_alone = self._shares.sum(axis=0)
        found = self._found(self._exchanged(np.where(self.rule < 0, np.inf, bytes_alone), None))
        if found is None:
            raise InfeasibleBudgetError(
                f"no plan of at most {self.most} different rules was found that meets all {len(self.limits)} limits of the "
                "budget; ask for a larger one or for more classes"
            )
        return found

    @cached_property
    def _shares(self) -> Floats:
        """Bytes as shares of the limits."""
        shares: Floats = self.sizes / np.maximum(self.limits, 1)[:, None, None]
        return shares

    def _reduced(self, prices: Floats) -> Floats:
        """Returns costs with bytes at their prices."""
        reduced: Floats = self.costs + np.tensordot(prices, self._shares, axes=1)
        return reduced

    def _among(self, opened: Ints) -> Ints | None:
        """Returns the open classes that every row can take part in, `[rows, opened]`, the first one where one of them is not.

        None where a row can take part in none.
        """
        can = self.rule[:, opened] >= 0
        if not can.any(axis=1).all():
            return None
        first = opened[np.argmax(can, axis=1)]
        return np.where(can, opened, first[:, None])

    def _prices(self, among: Ints | None) -> Floats:
        """Returns the best prices of bytes where every row chooses among some classes."""
        assert among is not None
        costs, sizes = self._tables(among)
        cheapest = np.argmin(costs, axis=1)
        if (sizes[:, np.arange(len(costs)), cheapest].sum(axis=1) <= self.limits).all():
            return np.zeros(len(self.limits))
        return best_prices(costs, sizes / np.maximum(self.limits, 1)[:, None, None])[0]

    def _found(self, opened: Ints, prices: Floats | None = None) -> _Found | None:
        """Returns a good choice among some classes, by prices if they are known; None if none is found within the limits."""
        among = self._among(opened)
        if among is None:
            return None
        try:
            solution = relaxed(*self._tables(among), self.limits, prices)
        except InfeasibleBudgetError:
            return None
        if solution is None:
            return None
        return _Found(opened, among, among[np.arange(len(among)), solution.choice], solution.cost)

    def _tables(self, among: Ints) -> tuple[Floats, Ints]:
        """Returns costs and bytes of the classes that every row chooses among, `[rows, opened]`."""
        return np.take_along_axis(self.costs, among, 1), np.take_along_axis(self.sizes, among[None], 2)

    def _exchanged(self, reduced: Floats, opened: Ints | None) -> Ints:
        """Returns the classes, at most as many as there may be, among which rows choose at the least total.

        It is the end of a local search: no exchange of one of them for another one gives less. It begins with `opened`, or with
        none, to which the best one is added as long as there may be more. Reduced costs are `[rows, classes]`, infinity where a
        row cannot take part.
        """
        reduced = _finite(reduced)
        found = [] if opened is None else opened.tolist()
        least = reduced[:, found].min(axis=1) if found else np.full(len(reduced), 2 * reduced.max() + 1.0)
        while len(found) < self.most:
            gain = np.maximum(least[:, None] - reduced, 0.0).sum(axis=0)
            best = int(np.argmax(gain))
            if gain[best] <= 0:
                break
            found.append(best)
            least = np.minimum(least, reduced[:, best])
        for _ in range(MAX_EXCHANGES):
            gains = self._gains(reduced, found)
            place, new = np.unravel_index(int(np.argmax(gains)), gains.shape)
            if gains[place, new] <= 1e-9 * max(float(np.abs(reduced[:, found].min(axis=1)).sum()), 1e-300):
                break
            found[place] = int(new)
        return np.array(sorted(found), np.int64)

    @staticmethod
    def _gains(reduced: Floats, opened: Sequence[int]) -> Floats:
        """Returns what is gained where one open class is closed and another one opened, `[opened, classes]`.

        Reduced costs are finite, `[rows, classes]`.
        """
        of_opened = reduced[:, opened]
        order = np.argsort(of_opened, axis=1, kind="stable")
        own = np.arange(len(opened)) == order[:, :1]  # [rows, opened]
        least = of_opened.min(axis=1)
        second = np.take_along_axis(of_opened, order[:, 1:2], 1)[:, 0] if len(opened) > 1 else reduced.max(axis=1)
        gain = np.maximum(least[:, None] - reduced, 0.0)
        # a row whose class is closed goes to its second best, or to the new one
        closed = np.maximum(second[:, None] - reduced, 0.0) - gain - (second - least)[:, None]
        gains: Floats = gain.sum(axis=0) + own.T.astype(np.float64) @ closed
        return gains


def _finite(reduced: Floats) -> Floats:
    """Returns the costs with a number in place of infinity that is more than all that choices can differ by."""
    known = reduced[np.isfinite(reduced)]
    return np.where(np.isfinite(reduced), reduced, known.max() + len(reduced) * (known.max() - known.min() + 1.0))


@dataclass(frozen=True, eq=False)
class _Found:
    """A choice among some classes.

    Attributes:
        opened: the classes.
        among: those that every row can take part in, `[rows, opened]`.
        classes: of every row, `[rows]`.
        cost: total.
    """

    opened: Ints
    among: Ints
    classes: Ints
    cost: float
