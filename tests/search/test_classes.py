"""Plans of few different rules: the choice of classes beside exact ones, and searches in which every plan keeps the limit."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import optimize, sparse

from moacompress.core.arrays import Floats, Ints
from moacompress.core.errors import InfeasibleBudgetError, UsageError
from moacompress.report.search_tables import class_lines
from moacompress.rules.candidates import candidate_rules
from moacompress.rules.kv_bytes import candidate_kv_bytes
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.rule_classes import classes_of
from moacompress.search.baselines import measured
from moacompress.search.problem.classes import ClassLimit
from moacompress.search.problem.plan_space import PlanSpace
from moacompress.search.problem.solver import solve
from moacompress.search.search_request import SearchRequest
from tests.search.conftest import Search, make_profile

Instance = tuple[Floats, Ints, Ints]


def instance(heads: int, share: float, seed: int) -> Instance:
    """Costs like a profile's, heavy-tailed over heads, with bytes and limits at two lengths."""
    rng, lengths = np.random.default_rng(seed), (512, 1024)
    rules = candidate_rules(max(lengths), (4, 64), 32)[::2]
    shape = ModelShape("llama", heads, 1, 1, 64, "float32", (None,) * heads, "w")
    sizes = candidate_kv_bytes(shape, rules, 32, lengths)[:, :, 0]
    gone = (1 - sizes / sizes[..., :1]).mean(axis=0)
    noise = np.exp(rng.normal(0, 0.5, gone.shape))
    costs = np.exp(rng.normal(-6, 2, (heads, 1))) * gone ** rng.uniform(1, 6, (heads, 1)) * noise
    return costs, sizes, (sizes.max(axis=2).sum(axis=1) * share).astype(np.int64)


def one_label_each(costs: Floats) -> Ints:
    return np.broadcast_to(np.arange(costs.shape[1]), costs.shape)


def total(costs: Floats, choice: Ints) -> float:
    return float(costs[np.arange(len(choice)), choice].sum())


def used(sizes: Ints, choice: Ints) -> Ints:
    return np.asarray(sizes[:, np.arange(len(choice)), choice].sum(axis=1))


def exact(costs: Floats, sizes: Ints, limits: Ints, most: int) -> float:
    """Least cost by mixed-integer programming: a variable for every rule of every head, and one for every rule."""
    heads, rules = costs.shape
    pairs = heads * rules
    of_pairs = sparse.kron(sparse.eye(heads), np.ones((1, rules)))
    opened = -sparse.kron(np.ones((heads, 1)), sparse.eye(rules))
    shares = sparse.csr_array((sizes / limits[:, None, None]).reshape(len(limits), -1))
    constraints = [
        optimize.LinearConstraint(sparse.hstack([of_pairs, sparse.csr_array((heads, rules))]), 1, 1),
        optimize.LinearConstraint(sparse.hstack([sparse.eye(pairs), opened]), -np.inf, 0),
        optimize.LinearConstraint(sparse.hstack([shares, sparse.csr_array((len(limits), rules))]), -np.inf, 1),
        optimize.LinearConstraint(np.r_[np.zeros(pairs), np.ones(rules)], -np.inf, most),
    ]
    scale = 1000 / solve(costs, sizes, limits).cost
    found = optimize.milp(
        np.r_[scale * costs.reshape(-1), np.zeros(rules)],
        constraints=constraints,
        integrality=np.ones(pairs + rules),
        bounds=optimize.Bounds(0, 1),
    )
    assert found.status == 0
    return float(found.fun / scale)


@pytest.mark.parametrize(("share", "most"), [(0.5, 2), (0.25, 4)])
def test_the_choice_is_close_to_optimal(share: float, most: int) -> None:
    worse = []
    for seed in range(3):
        costs, sizes, limits = instance(16, share, seed)
        choice = ClassLimit(most, one_label_each(costs)).solve(costs, sizes, limits)
        assert len(set(choice.tolist())) <= most < len(set(solve(costs, sizes, limits).choice.tolist()))
        assert (used(sizes, choice) <= limits).all()
        worse.append(total(costs, choice) / exact(costs, sizes, limits, most) - 1)
    assert min(worse) >= -1e-6
    assert max(worse) < 0.03


@pytest.mark.parametrize("seed", range(4))
def test_rules_that_rows_may_not_have_against_brute_force(seed: int) -> None:
    """Rows of two kinds, whose rules are never one class, with rules that single rows may not have."""
    rng = np.random.default_rng(seed)
    costs, sizes, _ = instance(5, 1.0, seed)
    costs, sizes = costs[:, ::5], sizes[:, :, ::5]
    labels = np.where(np.arange(5)[:, None] < 3, np.arange(costs.shape[1]), 100 + np.arange(costs.shape[1]))
    labels = np.where(rng.random(labels.shape) < 0.2, -1, labels)
    labels[:, 0] = [0, 0, 0, 100, 100]
    limits = np.quantile(sizes, 0.6, axis=2).sum(axis=1).astype(np.int64)
    best = np.inf
    for rules in itertools.product(range(costs.shape[1]), repeat=5):
        choice = np.array(rules)
        of_rows = labels[np.arange(5), choice]
        if (of_rows >= 0).all() and len(set(of_rows.tolist())) <= 3 and (used(sizes, choice) <= limits).all():
            best = min(best, total(costs, choice))
    limit = ClassLimit(3, labels)
    if not np.isfinite(best):
        with pytest.raises(InfeasibleBudgetError, match="at most 3 different rules"):
            limit.solve(costs, sizes, limits)
        return
    choice = limit.solve(costs, sizes, limits)
    of_rows = limit.of_choice(choice)
    assert (of_rows >= 0).all()
    assert len(set(of_rows.tolist())) <= 3
    assert (used(sizes, choice) <= limits).all()
    assert best * (1 - 1e-9) <= total(costs, choice) <= best * 1.1


def test_every_plan_of_a_search_keeps_the_limit(
    search: Search, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Trials and what is left over: no step makes a plan of more classes, nor one beyond the budget."""
    made: list[tuple[int | None, int]] = []
    plan_of = PlanSpace.plan

    def counted(self: PlanSpace, choice: Ints) -> Plan:
        plan = plan_of(self, choice)
        limit = self.knapsack.classes
        made.append((None if limit is None else limit.most, len(classes_of(plan))))
        return plan

    monkeypatch.setattr(PlanSpace, "plan", counted)
    settings: dict[str, Any] = {"layers": 12, "formats": True, "trials": 4, "classes": 5}
    profile, out = make_profile(**settings), tmp_path / "plan.json"
    found, fake = search(profile, "25%", out=out)
    assert {most for most, _ in made} == {5, None}  # None: what the limit is compared with
    assert max(classes for most, classes in made if most == 5) == 5
    names = [stage["name"].split(",")[0] for stage in found.explanation["stages"]]
    assert {"surrogate", "study"} <= set(names)
    plan = Plan.load(out)
    for n in profile.lengths:
        assert plan.kv_bytes(n) <= profile.shape.dense_kv_bytes(n) // 4
    assert found.harm["plan"] == pytest.approx(np.mean(fake.kls(plan)))

    notes = found.classes
    assert notes == plan.quality["classes"] == found.explanation["classes"]
    assert (notes["most"], notes["plan"]) == (5, len(classes_of(plan)))
    assert notes["limited"]["classes"] <= 5 < notes["unlimited"]["classes"]
    assert notes["limited"]["predicted_harm"] > notes["unlimited"]["predicted_harm"] > 0
    assert notes["difference"]["value"] > 0
    lines = class_lines(found.explanation)
    assert "at most 5 were allowed" in lines[0]
    assert f"Without the limit the plan of trial {notes['trial']} has {notes['unlimited']['classes']}" in lines[1]

    before = len(fake.calls)
    again, fake = search(profile, "25%", out=out)
    assert (again.plan, len(fake.calls)) == (plan, 0)
    assert before > 0
    other, _ = search(make_profile(**{**settings, "classes": None}), "25%")
    assert other.classes is None
    assert other.plan.provenance["search"] != plan.provenance["search"]
    assert other.harm["plan"] < found.harm["plan"]
    assert class_lines(other.explanation) == []


def test_a_limit_that_does_not_bind_changes_nothing(search: Search) -> None:
    whole, _ = search(make_profile(layers=6, trials=4))
    count = len(classes_of(whole.plan))
    loose, _ = search(make_profile(layers=6, trials=4, classes=12))
    assert loose.plan.rules == whole.plan.rules
    assert loose.classes == {
        "most": 12,
        "plan": count,
        "trial": loose.best_trial,
        "limited": loose.classes["limited"],
        "unlimited": loose.classes["limited"],
        "difference": {
            "value": 0.0,
            "standard_error": 0.0,
            "ci95": [0.0, 0.0],
            "samples": 8,
            "p": 1.0,
            "candidates": 1,
        },
    }


def test_layers_that_share_are_of_one_class(search: Search) -> None:
    profile = make_profile(layers=8, anchors=2, copying=0.01, trials=3, share="2", classes=3)
    found, _ = search(profile, "30%")
    assert sum(share is not None for share in found.plan.shares) == 2
    assert len(classes_of(found.plan)) <= 3


def test_floors_hold_within_few_classes(search: Search) -> None:
    profile = make_profile(layers=6, trials=3, floors={1: 0.5}, classes=3, alternatives=False)
    found, _ = search(profile, "40%")
    assert found.classes == {"most": 3, "plan": len(classes_of(found.plan))}  # without alternatives nothing is compared
    assert len(classes_of(found.plan)) <= 3
    for n in profile.lengths:
        full = Rule.FULL.slots(n, profile.min_window)
        assert all(rule.slots(n, profile.min_window) >= full / 2 for rule in found.plan.rules[1])


def test_a_baseline_of_more_classes_is_not_taken(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    """However good it measures: what is handed back has the classes that were asked for."""
    profile = make_profile(layers=6, trials=2, classes=2)
    unlimited = SearchRequest.of(profile, "50%", profile.recipe).of_any_classes()
    other = unlimited.plan(unlimited.parameters.neutral)
    assert len(classes_of(other)) > 2
    monkeypatch.setattr(measured, "_candidates", lambda family, request: [other] if family == "per_layer" else [])
    found, _ = search(profile, "50%")
    assert found.harm["per_layer"] < found.harm["plan"]
    assert len(classes_of(found.plan)) <= 2


def test_sliding_windows_are_classes_of_their_own() -> None:
    profile = make_profile(layers=6)  # layer 4 has a sliding window of 64
    recipe = profile.recipe.override(search__classes=1)
    with pytest.raises(UsageError, match=r"at least 2 classes .* \(none, 64\); ask for --classes 2"):
        SearchRequest.of(profile, "50%", recipe)
    plan = replace(Plan.full(profile.shape))
    assert [len(heads) for heads in classes_of(plan).values()] == [10, 2]
    gated = Rule(4, 32, 0, select_alpha=16)
    rules = tuple((gated if layer != 4 else gated.without_choice(),) * 2 for layer in range(6))
    found = classes_of(replace(plan, rules=rules, gates="g"))
    assert [*found] == [(gated, None), (gated.without_choice(), 64)]
