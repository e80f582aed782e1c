"""Constraints: costs in bytes and in time say of tables and of plans the same, and budgets become limits of them."""

from __future__ import annotations

import re

import numpy as np
import pytest

from moacompress.core.errors import ArtefactError, BudgetError, InfeasibleBudgetError
from moacompress.rules.budget import Budget
from moacompress.rules.candidates import candidate_rules, gated_rules, in_formats
from moacompress.rules.constraints import (
    Constraint,
    Cost,
    KvBytes,
    Latency,
    below_floors_at,
    budget_constraints,
    byte_constraints,
    cost_tables,
    lengths_of,
    limit_array,
    step_times,
)
from moacompress.rules.cost import byte_table, smallest_bytes
from moacompress.rules.cost_table import CostTable
from moacompress.rules.formats import CODED
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import SINKS, Rule
from moacompress.rules.share import Share
from moacompress.rules.step_time import StepTime
from tests.cost_tables import FLOOR, known_ns, known_table, read

SHAPE = ModelShape("llama", 3, 4, 2, 16, "float32", (None, 64, None), "0123456789abcdef")
RULES = in_formats((*candidate_rules(512, SINKS, 16), *gated_rules(512, SINKS, 16)), CODED)
ARGUMENTS = (SHAPE, (256, 512), RULES, 16)
FULL_NS = {(512, 8): known_ns(Plan.full(SHAPE), 512, 8)}


@pytest.fixture(scope="module")
def costs() -> CostTable:
    return read(known_table(SHAPE, (512, 1024), (1, 8)))


def parsed(*texts: str) -> list[Budget]:
    return [Budget.parse(text) for text in texts]


@pytest.mark.parametrize("seed", range(4))
def test_a_table_and_a_plan_say_the_same(seed: int, costs: CostTable) -> None:
    """To the unit: the solver, the plan's notes and what is checked agree."""
    random = np.random.default_rng(seed)
    choice = random.integers(len(RULES), size=(SHAPE.layers, SHAPE.kv_heads))
    rows = [[RULES[number] for number in row] for row in choice.tolist()]
    rows[1] = [rule.without_choice() for rule in rows[1]]  # as plans have them in a layer with a window of its own
    plan = Plan(SHAPE, 16, tuple(map(tuple, rows)), gates="0" * 16)
    index = {rule: number for number, rule in enumerate(RULES)}
    choice = np.array([[index[rule] for rule in row] for row in rows])
    every: list[Cost] = [KvBytes(512), KvBytes(300), *map(Latency, step_times(costs))]
    for cost in every:
        table = cost.table(SHAPE, RULES, 16)
        assert table.dtype == np.int64
        assert table.shape == (3, 2, len(RULES))
        assert np.take_along_axis(table, choice[..., None], axis=-1).sum() == cost.of(plan)
        assert Constraint(cost, cost.of(plan)).holds(plan)
        assert not Constraint(cost, cost.of(plan) - 1).holds(plan)


def test_bytes_are_those_of_the_byte_table() -> None:
    limits = {256: 1000, 512: 2000}
    found = byte_constraints(limits)
    assert (cost_tables(found, SHAPE, RULES, 16) == byte_table(SHAPE, RULES, 16, [256, 512])).all()
    assert limit_array(found).tolist() == [1000, 2000]
    assert [one.key for one in found] == [[256, 1000], [512, 2000]]  # as searches were always known by
    assert str(found[0]) == "1,000 KV bytes at 256 tokens"
    assert lengths_of(found) == [256, 512]


def test_shares_of_bytes_and_the_smallest_budget() -> None:
    limits = budget_constraints(parsed("50%"), *ARGUMENTS)
    assert [(one.cost, one.limit) for one in limits] == [(KvBytes(n), SHAPE.dense_kv_bytes(n) // 2) for n in (256, 512)]
    assert lengths_of(budget_constraints(parsed("50%@1k"), *ARGUMENTS)) == [1024]
    with pytest.raises(InfeasibleBudgetError, match="at least") as error:
        budget_constraints(parsed("1%"), *ARGUMENTS)
    need = str(error.value).split("at least ")[1].split("%")[0]
    budget_constraints(parsed(f"{need}%@256"), *ARGUMENTS)
    with pytest.raises(BudgetError, match="no budget"):
        budget_constraints([], *ARGUMENTS)


def test_a_latency_is_what_a_step_may_take_above_the_floor(costs: CostTable) -> None:
    (one,) = budget_constraints(parsed("latency=0.8@512x8"), *ARGUMENTS, costs=costs)
    assert isinstance(one.cost, Latency)
    assert (one.cost.length, one.cost.step.rows) == (512, 8)
    assert one.limit == pytest.approx(0.8 * FULL_NS[512, 8] - FLOOR, abs=2)
    assert one.holds(Plan.uniform(SHAPE, Rule(4, 16, 0), 16))
    assert not one.holds(Plan.full(SHAPE))
    assert str(one) == f"a step of {0.8 * FULL_NS[512, 8] / 1e6:.4g} ms at 512 tokens in 8 rows"
    assert one.key[:3] == ["latency", 512, 8]


def test_several_budgets_all_hold_bytes_first(costs: CostTable) -> None:
    asked = parsed("latency=0.8@1kx8", "latency=0.9@512x8", "latency=0.7@512x8", "512MiB@2k", "50%")
    found = budget_constraints(asked, *ARGUMENTS, costs=costs)
    places = [(one.cost.length, getattr(getattr(one.cost, "step", None), "rows", None)) for one in found]
    assert places == [(256, None), (512, None), (2048, None), (512, 8), (1024, 8)]
    assert found[3].limit == pytest.approx(0.7 * FULL_NS[512, 8] - FLOOR, abs=2)  # the tightest counts
    assert cost_tables(found, SHAPE, RULES, 16).shape == (5, 3, 2, len(RULES))
    assert lengths_of(found) == [256, 512, 1024, 2048]


def test_what_weights_alone_take_is_the_floor(costs: CostTable) -> None:
    full = FULL_NS[512, 8]
    with pytest.raises(InfeasibleBudgetError) as error:
        budget_constraints(parsed(f"latency={0.9 * FLOOR / full:.3f}@512x8"), *ARGUMENTS, costs=costs)
    for part in (f"weights alone take {FLOOR / 1e6:.4g} of the {full / 1e6:.4g} ms at full span", "ask for more"):
        assert part in str(error.value)
    with pytest.raises(
        InfeasibleBudgetError, match="the fastest has a step of .* of which weights alone take"
    ) as error:
        budget_constraints(parsed(f"latency={1.001 * FLOOR / full}@512x8"), *ARGUMENTS, costs=costs)
    need = re.search(r"at least ([\d.]+) of full span", str(error.value))
    assert need is not None
    assert budget_constraints(parsed(f"latency={need[1]}@512x8"), *ARGUMENTS, costs=costs)
    with pytest.raises(InfeasibleBudgetError):
        budget_constraints(parsed(f"latency={float(need[1]) - 0.002:.4f}@512x8"), *ARGUMENTS, costs=costs)


def test_without_a_table_the_command_is_named(costs: CostTable) -> None:
    command = "moacompress bench MODEL --cost-table costs.json --lengths 4k --batch 8"
    with pytest.raises(BudgetError, match=re.escape(command)):
        budget_constraints(parsed("latency=0.8@4kx8"), *ARGUMENTS)
    with pytest.raises(BudgetError, match=re.escape("the cost table has 512x1, 512x8, 1kx1, 1kx8")) as error:
        budget_constraints(parsed("latency=0.8@4kx8"), *ARGUMENTS, costs=costs)
    assert command in str(error.value)


def test_layers_that_share_are_refused(costs: CostTable) -> None:
    shape = ModelShape("llama", 3, 4, 2, 16, "float32", (None, None, None), "0123456789abcdef")
    shares = (None, None, Share(1, (0, 1)))
    costs = read(known_table(shape, (512,), (8,)))
    with pytest.raises(BudgetError, match="leave out --share or that budget"):
        budget_constraints(parsed("latency=0.8@512x8"), shape, (256, 512), RULES, 16, shares=shares, costs=costs)


def test_floors_are_of_bytes_whatever_is_limited(costs: CostTable) -> None:
    """A layer that must keep half of its bytes keeps them, though fewer bits take less time."""
    floors = np.array([0.0, 0.0, 0.5])
    found = budget_constraints(parsed("latency=0.9@512x8"), *ARGUMENTS, floors=floors, costs=costs)
    below = below_floors_at(found, SHAPE, RULES, 16, floors)
    sizes = byte_table(SHAPE, RULES, 16, [512])[0]
    assert (below == (sizes < np.ceil(floors[:, None, None] * sizes[..., :1]))).all()
    assert below[2].any()
    assert not below[:2].any()
    assert smallest_bytes(SHAPE, RULES, 16, [512], floors)[512] > smallest_bytes(SHAPE, RULES, 16, [512])[512]


def test_what_a_table_has_not_measured_is_no_option(costs: CostTable) -> None:
    cell = costs.cells[0].model_copy(deep=True)
    cell.points = [
        point for point in cell.points if all("int4" not in (g.key_format, g.value_format) for g in point.groups)
    ]
    with pytest.raises(ArtefactError, match="has not measured the format int4"):
        Latency(StepTime.fit(cell)).table(SHAPE, RULES, 16)
