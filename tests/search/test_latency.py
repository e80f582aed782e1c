"""Budgets of latency: the solver prices rules by time as exactly as by bytes, and a search holds and reports them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moacompress.calibration.profile.store import Profile
from moacompress.core.errors import ArtefactError, BudgetError, InfeasibleBudgetError
from moacompress.rules.constraints import Latency, cost_tables, limit_array
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.search.problem.knapsack import Knapsack
from moacompress.search.problem.solver import solve
from moacompress.search.search_request import SearchRequest
from tests.cost_tables import FLOOR, known_ns, known_table

Profiles = Callable[..., Profile]
Search = Callable[..., tuple[Any, Any]]
PLACE = "512x4"


@pytest.fixture
def table(profiles: Profiles, tmp_path: Path) -> Path:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(known_table(profiles().shape, (256, 512), (4,))))
    return path


def request(profile: Profile, budget: Any, table: Path | None, **search: Any) -> SearchRequest:
    recipe = profile.recipe.override(search__cost_table=None if table is None else str(table), **search)
    return SearchRequest.of(profile, budget, recipe)


def share_of(profile: Profile, above_floor: float) -> str:
    """Returns the budget that leaves so much of what full span takes above the floor."""
    full = known_ns(Plan.full(profile.shape), 512, 4)
    return f"latency={(FLOOR + above_floor * (full - FLOOR)) / full:.6f}@{PLACE}"


@pytest.mark.parametrize("solver", ["lagrange", "milp"])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_least_cost_within_a_time_is_found(
    seed: int, both: bool, solver: str, profiles: Profiles, tmp_path: Path
) -> None:
    """Against all choices there are, of six KV heads with five rules."""
    profile = profiles(layers=3, seed=seed)
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(known_table(profile.shape, (512,), (4,))))
    budget = [share_of(profile, 0.4), *(["45%@512"] if both else [])]
    constraints = request(profile, budget, path).constraints
    assert len(constraints) == 1 + both
    rules = [
        Rule.FULL, Rule(4, 128, 0), Rule(4, 128, 0, "int8", "int4"), Rule(4, 32, 0, "int4", "int4"),
        Rule(4, 0, 1024, "int8", "int8"),
    ]  # fmt: skip
    sizes = cost_tables(constraints, profile.shape, rules, 32).reshape(len(constraints), -1, len(rules))
    limits = limit_array(constraints)
    costs = np.exp(np.random.default_rng(seed).normal(0, 2, sizes.shape[1:])) * np.array([0, 2, 3, 5, 1])
    choices = np.array(list(itertools.product(range(len(rules)), repeat=sizes.shape[1])))
    heads = np.arange(sizes.shape[1])
    fits = (sizes[:, heads, choices].sum(-1) <= limits[:, None]).all(0)
    best = costs[heads, choices[fits]].sum(-1).min()
    found = solve(costs, sizes, limits, solver=solver)
    assert (sizes[:, heads, found.choice].sum(-1) <= limits).all()
    assert found.cost == pytest.approx(best, rel=2e-3 if solver == "lagrange" else 1e-4)


def test_time_and_bytes_price_rules_differently(profiles: Profiles, table: Path) -> None:
    """Codes of four bits take a third of the bytes of the keys, and not a third of their time."""
    profile = profiles(formats=True)
    asked = request(profile, share_of(profile, 0.5), table)
    knapsack = Knapsack.of(asked)
    costs = asked.surrogate.costs()
    plan = asked.plan(asked.surrogate, asked.parameters.neutral)
    (constraint,) = asked.constraints
    assert constraint.holds(plan)
    assert constraint.cost.of(plan) > 0.98 * constraint.limit
    of_bytes = request(profile, f"{plan.kv_share(512):.6f}@512", None)
    other = of_bytes.plan(of_bytes.surrogate, of_bytes.parameters.neutral)
    assert other.key() != plan.key()
    assert not constraint.holds(other)
    assert (knapsack.sizes >= 0).all()
    assert costs.shape[:2] == knapsack.sizes.shape[1:3]


@pytest.mark.parametrize("extra", [(), ("40%",)])
def test_a_search_holds_its_latency_and_says_what_is_predicted(
    extra: tuple[str, ...], search: Search, profiles: Profiles, table: Path, tmp_path: Path
) -> None:
    profile = profiles(formats=True, trials=4, rounds=1, moves=2)
    budget = [share_of(profile, 0.5), *extra]
    recipe = profile.recipe.override(search__cost_table=str(table))
    out = tmp_path / "plan.json"
    found, _ = search(profile, budget, recipe=recipe, out=out)
    constraints = SearchRequest.of(profile, budget, recipe).constraints
    assert len(constraints) == 1 + 2 * len(extra)
    assert all(constraint.holds(found.plan) for constraint in constraints)
    row = found.step_ms[PLACE]
    exact = known_ns(found.plan, 512, 4) / 1e6
    assert row["predicted"] == pytest.approx(exact, rel=1e-4)
    assert row["predicted"] <= row["limit"] + 1e-9
    assert row["floor"] == pytest.approx(FLOOR / 1e6, rel=1e-6)
    assert row["full_span"] == pytest.approx(known_ns(Plan.full(profile.shape), 512, 4) / 1e6)
    assert found.step_ms["256x4"]["limit"] is None
    notes = json.loads(out.read_text())
    assert notes["budget"]["step_ms"] == found.step_ms
    assert notes["provenance"]["recipe"]["search"]["cost_table"] == "costs.json"
    for family in ("uniform", "per_layer", "duo", "quantized"):  # equal time for those that it is measured beside
        beside = tmp_path / "plan.baselines" / f"{family}.json"
        if beside.exists():
            assert all(constraint.holds(Plan.load(beside)) for constraint in constraints)
    assert (tmp_path / "plan.baselines" / "uniform.json").exists()
    assert Plan.load(out) == found.plan
    again, fake = search(profile, budget, recipe=recipe, out=out)
    assert (again.plan, fake.calls) == (found.plan, [])


def test_another_table_is_another_search(profiles: Profiles, table: Path) -> None:
    profile = profiles()
    budget = share_of(profile, 0.5)
    key = request(profile, budget, table).key
    data = json.loads(table.read_text())
    data["measured"] = "2027-01-01T00:00:00+00:00"
    table.write_text(json.dumps(data))
    assert request(profile, budget, table).key == key  # the same times
    data["cells"][1]["points"][3]["ms"] *= 1.01
    table.write_text(json.dumps(data))
    assert request(profile, budget, table).key != key


def test_a_table_alone_predicts_and_changes_nothing(profiles: Profiles, table: Path) -> None:
    profile = profiles()
    with_table, without = request(profile, "50%", table), request(profile, "50%", None)
    assert with_table.key == without.key
    assert with_table.constraints == without.constraints
    assert [(step.length, step.rows) for step in with_table.step_times] == [(256, 4), (512, 4)]
    assert not without.step_times


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("device", "cuda", "device cuda in the table, cpu here"),
        ("threads", 77, "threads 77 in the table, 1 here"),
        ("kernel", "other", "kernel other in the table"),
        ("isa", "other", "isa other in the table"),
        ("processor", "A chip", "processor A chip in the table"),
        ("weights", "int8", "weights int8 in the table, keep here"),
    ],
)
def test_a_table_of_elsewhere_is_refused_by_name(
    where: str, value: Any, words: str, profiles: Profiles, table: Path
) -> None:
    data = json.loads(table.read_text())
    data["configuration"][where] = value
    table.write_text(json.dumps(data))
    with pytest.raises(ArtefactError) as error:
        request(profiles(), "50%", table)
    assert words in str(error.value)
    assert "moacompress bench MODEL --cost-table" in str(error.value)


def test_a_table_of_another_model_is_refused_by_name(profiles: Profiles, table: Path) -> None:
    with pytest.raises(ArtefactError, match="layers 6 in the table, 7 here"):
        request(profiles(layers=7), "50%", table)


def test_what_cannot_be_asked_for(profiles: Profiles, table: Path, tmp_path: Path) -> None:
    profile = profiles()
    with pytest.raises(
        BudgetError, match="there is no cost table; measure one on this machine, moacompress bench MODEL"
    ):
        request(profile, "latency=0.8@512x4", None)
    with pytest.raises(ArtefactError, match="there is no cost table .*none.json; measure one"):
        request(profile, "50%", tmp_path / "none.json")
    with pytest.raises(BudgetError, match="the cost table has 256x4, 512x4"):
        request(profile, "latency=0.8@512x8", table)
    with pytest.raises(InfeasibleBudgetError, match=r"weights alone take 0\.2 of the"):
        request(profile, "latency=0.01@512x4", table)


def test_layers_that_share_have_no_latency(profiles: Profiles, table: Path) -> None:
    profile = profiles(anchors=2)
    for share in ("2", "auto"):
        with pytest.raises(BudgetError, match="leave out --share or that budget"):
            request(profile, "latency=0.9@512x4", table, search__share=share)
    plan = request(profile, "50%", table, search__share="2")
    found = plan.plan(plan.surrogate, plan.parameters.neutral)
    assert any(found.shares)


def test_classes_keep_a_latency(profiles: Profiles, table: Path) -> None:
    from moacompress.rules.rule_classes import classes_of

    profile = profiles(formats=True)
    asked = request(profile, share_of(profile, 0.5), table, search__classes=4)
    plan = asked.plan(asked.surrogate, asked.parameters.neutral)
    assert len(classes_of(plan)) <= 4
    assert all(isinstance(one.cost, Latency) and one.holds(plan) for one in asked.constraints)


def test_a_cost_table_that_is_given_later_is_noted(
    search: Callable[..., Any], profiles: Profiles, table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    first = search(profiles(trials=1), "50%", out=out)[0]
    assert first.step_ms == {}
    again, fake = search(profiles(trials=1, cost_table=str(table)), "50%", out=out)
    assert fake.calls == []
    assert set(again.step_ms) == {"256x4", "512x4"}
    assert Plan.load(out).budget["step_ms"] == again.step_ms
    assert again.plan.rules == first.plan.rules
    written = out.read_bytes()
    search(profiles(trials=1, cost_table=str(table)), "50%", out=out)
    assert out.read_bytes() == written
