"""What a plan may take: costs, each in a unit of its own, and the most that a plan may have of each.

The KV bytes at a length are a cost, and so is the time of a step at a length and a number of rows. Both are sums over KV heads,
in whole units (bytes, nanoseconds), so one solver prices options by either, or by all that budgets restrict at once, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from moacompress.core.arrays import Ints
from moacompress.core.errors import BudgetError, InfeasibleBudgetError
from moacompress.rules.budget import Budget, byte_limits, check_feasible, format_length, memory_budgets
from moacompress.rules.cost import Shares, below_floors, byte_table
from moacompress.rules.cost_table import CostTable, command_for
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.share import LayerShares
from moacompress.rules.step_time import NS_PER_MS, StepTime


class Cost(Protocol):
    """Something that plans take, summed over KV heads, in whole units."""

    @property
    def length(self) -> int:
        """Tokens at which it is taken."""

    @property
    def key(self) -> list[Any]:
        """JSON values by which it is known in a fingerprint."""

    def table(self, shape: ModelShape, rules: Sequence[Rule], min_window: int, shares: LayerShares = ()) -> Ints:
        """Returns what every KV head takes under every rule, int64 `[layers, kv_heads, rules]`.

        Args:
            shape: of the model.
            rules: candidates.
            min_window: smallest window, tokens.
            shares: what each layer takes from an earlier one; empty for nothing.
        """

    def of(self, plan: Plan) -> int:
        """Returns what a plan takes."""

    def text(self, amount: int) -> str:
        """Returns an amount with its unit."""

    def place(self) -> str:
        """Returns where it is taken, such as `at 8k tokens`."""

    def check(self, limit: int, smallest: int, shape: ModelShape) -> None:
        """Refuses a limit below the smallest plan there is.

        Args:
            limit: most that a plan may take.
            smallest: what the smallest one takes.
            shape: of the model.

        Raises:
            InfeasibleBudgetError: names the place, both amounts and the smallest budget that works.
        """


@dataclass(frozen=True)
class KvBytes:
    """The bytes of the cache of one row.

    Attributes:
        length: tokens in the cache.
    """

    length: int

    @property
    def key(self) -> list[Any]:
        """As `Cost`."""
        return [self.length]

    def table(self, shape: ModelShape, rules: Sequence[Rule], min_window: int, shares: LayerShares = ()) -> Ints:
        """As `Cost`."""
        found: Ints = byte_table(shape, rules, min_window, [self.length], shares)[0]
        return found

    def of(self, plan: Plan) -> int:
        """As `Cost`."""
        return plan.kv_bytes(self.length)

    def text(self, amount: int) -> str:
        """As `Cost`."""
        return f"{amount:,} KV bytes"

    def place(self) -> str:
        """As `Cost`."""
        return f"at {format_length(self.length)} tokens"

    def check(self, limit: int, smallest: int, shape: ModelShape) -> None:
        """As `Cost`."""
        check_feasible({self.length: limit}, {self.length: smallest}, shape)


@dataclass(frozen=True)
class Latency:
    """The time of a decode step above its floor, nanoseconds.

    Attributes:
        step: fitted to a cost table.
    """

    step: StepTime

    @property
    def length(self) -> int:
        """As `Cost`."""
        return self.step.length

    @property
    def key(self) -> list[Any]:
        """As `Cost`."""
        return ["latency", self.step.length, self.step.rows, self.step.fingerprint]

    def table(self, shape: ModelShape, rules: Sequence[Rule], min_window: int, shares: LayerShares = ()) -> Ints:
        """As `Cost`; `check_no_sharing` has refused layers that share."""
        rows = [self.step.head_ns(rules, min_window, native) for native in shape.native_windows]
        return np.repeat(np.stack(rows)[:, None], shape.kv_heads, axis=1)

    def of(self, plan: Plan) -> int:
        """As `Cost`."""
        return self.step.above_floor_ns(plan)

    def text(self, amount: int) -> str:
        """As `Cost`; the floor is added, so that it is the time of a whole step."""
        return f"a step of {self.step.floor_ms + amount / NS_PER_MS:.4g} ms"

    def place(self) -> str:
        """As `Cost`."""
        return f"at {format_length(self.length)} tokens in {self.step.rows} rows"

    def check(self, limit: int, smallest: int, shape: ModelShape) -> None:
        """As `Cost`."""
        if smallest > limit:
            need = math.ceil(1000 * (self.step.floor_ms + smallest / NS_PER_MS) / self.step.full_span_ms) / 1000
            raise InfeasibleBudgetError(
                f"no plan fits {self.text(limit)} {self.place()}: the fastest has {self.text(smallest)}, of which weights "
                f"alone take {self.step.floor_ms:.4g}; ask for at least {need:g} of full span there"
            )


@dataclass(frozen=True)
class Constraint:
    """The most that a plan may take of a cost.

    Attributes:
        cost: what is taken.
        limit: the most, in its unit.
    """

    cost: Cost
    limit: int

    @property
    def key(self) -> list[Any]:
        """JSON values by which it is known in a fingerprint."""
        return [*self.cost.key, self.limit]

    def holds(self, plan: Plan) -> bool:
        """Returns whether a plan takes no more."""
        return self.cost.of(plan) <= self.limit

    def __str__(self) -> str:
        return f"{self.cost.text(self.limit)} {self.cost.place()}"


Constraints = tuple[Constraint, ...]
"""All that must hold: KV bytes first, the shortest length first."""


def byte_constraints(limits: Mapping[int, int]) -> Constraints:
    """Returns constraints of most KV bytes by length, in tokens."""
    return tuple(Constraint(KvBytes(length), limit) for length, limit in limits.items())


def lengths_of(constraints: Iterable[Constraint]) -> list[int]:
    """Returns the lengths that constraints speak of, in tokens, ascending."""
    return sorted({constraint.cost.length for constraint in constraints})


def limit_array(constraints: Sequence[Constraint]) -> Ints:
    """Returns the limits, int64 `[constraints]`."""
    return np.array([constraint.limit for constraint in constraints], np.int64)


def cost_tables(
    constraints: Sequence[Constraint],
    shape: ModelShape,
    rules: Sequence[Rule],
    min_window: int,
    shares: LayerShares = (),
) -> Ints:
    """Returns what every KV head takes of every cost under every rule, int64 `[constraints, layers, kv_heads, rules]`."""
    return np.stack([constraint.cost.table(shape, rules, min_window, shares) for constraint in constraints])


def below_floors_at(
    constraints: Sequence[Constraint],
    shape: ModelShape,
    rules: Sequence[Rule],
    min_window: int,
    floors: Shares,
    shares: LayerShares = (),
) -> np.ndarray:
    """Returns whether a rule keeps less than its layer's floor at some of the lengths, bool `[layers, kv_heads, rules]`.

    A floor is a share of KV bytes, whatever the constraints are of.
    """
    return below_floors(byte_table(shape, rules, min_window, lengths_of(constraints), shares), floors)


def check_no_sharing(budgets: Iterable[Budget]) -> None:
    """Refuses budgets of latency for plans whose layers may share attention.

    Raises:
        BudgetError: one of them is of latency.
    """
    for budget in budgets:
        if budget.rows is not None:
            raise BudgetError(
                f"the budget {budget.text} is of time, and cost tables say nothing of layers that share attention; leave out "
                "--share or that budget"
            )


def step_times(table: CostTable | None) -> list[StepTime]:
    """Returns the fitted times of a step of every cell of a cost table; none without one."""
    return [] if table is None else [StepTime.fit(cell) for cell in table.cells]


def budget_constraints(
    budgets: Sequence[Budget],
    shape: ModelShape,
    lengths: Sequence[int],
    rules: Sequence[Rule],
    min_window: int,
    floors: Shares | None = None,
    shares: LayerShares = (),
    costs: CostTable | None = None,
    weights: int | None = None,
) -> Constraints:
    """Returns the constraints of budgets, which all must hold.

    Args:
        budgets: as asked for.
        shape: the model.
        lengths: profiled lengths, where a budget without a length holds.
        rules: candidate rules, for the smallest plan there is.
        min_window: smallest window, tokens.
        floors: smallest share that every layer keeps, [layers]; none by default.
        shares: what each layer takes from an earlier one.
        costs: the cost table that budgets of latency go by.
        weights: bytes of the checkpoint's weight files, which budgets of memory count too; None where they are not known.

    Raises:
        BudgetError: no budget; or one of latency without a cost table, at a length or number of rows that it lacks, or with
            layers that share; or one of memory where nothing is known of the weights.
        InfeasibleBudgetError: no plan of these rules fits; says the smallest budget that works.
    """
    if any(shares):
        check_no_sharing(budgets)
    for budget in memory_budgets(budgets):
        if weights is None:
            raise BudgetError(
                f"the budget {budget.text} is of weights and cache together, which `search` and `compress` know; give one of "
                "KV bytes here, such as 25%"
            )
        _check_memory(budget, weights, shape, rules, min_window, floors, shares)
    found = byte_constraints(byte_limits(budgets, shape, lengths, weights))
    found += tuple(_latency_constraints([budget for budget in budgets if budget.rows is not None], costs))
    tables = cost_tables(found, shape, rules, min_window, shares)
    if floors is not None:
        below = below_floors_at(found, shape, rules, min_window, floors, shares)
        tables = np.where(below, tables[..., :1], tables)
    for constraint, smallest in zip(found, tables.min(axis=-1).sum(axis=(1, 2)).tolist(), strict=True):
        constraint.cost.check(constraint.limit, smallest, shape)
    return found


def _check_memory(
    budget: Budget,
    weights: int,
    shape: ModelShape,
    rules: Sequence[Rule],
    min_window: int,
    floors: Shares | None,
    shares: LayerShares,
) -> None:
    """Refuses a budget of memory that weights and the smallest cache exceed.

    Raises:
        InfeasibleBudgetError: says what each of them takes.
    """
    limit, length = budget.bytes or 0, budget.length or 0
    only = byte_constraints({length: limit})
    table = cost_tables(only, shape, rules, min_window, shares)
    if floors is not None:
        table = np.where(below_floors_at(only, shape, rules, min_window, floors, shares), table[..., :1], table)
    smallest = int(table.min(axis=-1).sum())
    if weights + smallest <= limit:
        return
    raise InfeasibleBudgetError(
        f"no plan fits {budget.text}, {limit:,} bytes: weights take {weights:,} as they are and the KV cache at least "
        f"{smallest:,} at {format_length(length)} tokens, {weights + smallest:,} in all; ask for at least that, or "
        "profile smaller weights (--weights int8 or int4)"
    )


def _latency_constraints(budgets: Sequence[Budget], costs: CostTable | None) -> Iterable[Constraint]:
    """Yields the constraints of budgets of latency, the tightest one of each length and number of rows."""
    places = sorted({(budget.length or 0, budget.rows or 0) for budget in budgets})
    for length, rows in places:
        budget = min(
            (one for one in budgets if (one.length, one.rows) == (length, rows)), key=lambda one: one.share or 0.0
        )
        if costs is None:
            raise BudgetError(
                f"the budget {budget.text} is a share of the time that a step takes, and there is no cost table; measure one "
                f"on this machine, {command_for('costs.json', places)}, and give it: --cost-table costs.json"
            )
        cell = costs.find_cell(length, rows)
        if cell is None:
            raise BudgetError(
                f"the budget {budget.text} is for {format_length(length)} tokens in {rows} rows; the cost table has "
                f"{costs.cell_names}: ask for one of these, or measure it: {command_for('costs.json', places)}"
            )
        step = StepTime.fit(cell)
        allowed = (budget.share or 0.0) * step.full_span_ms
        if allowed <= step.floor_ms:
            raise InfeasibleBudgetError(
                f"the budget {budget.text} allows a step of {allowed:.4g} ms, and weights alone take {step.floor_ms:.4g} of "
                f"the {step.full_span_ms:.4g} ms at full span, {step.floor_ms / step.full_span_ms:.3f} of them; no plan is "
                "faster, so ask for more"
            )
        yield Constraint(Latency(step), int((allowed - step.floor_ms) * NS_PER_MS))
