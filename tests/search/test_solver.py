from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, sparse

from moacompress.core.arrays import Floats, Ints
from moacompress.core.errors import InfeasibleBudgetError
from moacompress.rules.candidates import candidate_rules
from moacompress.rules.kv_bytes import candidate_kv_bytes
from moacompress.rules.model_shape import ModelShape
from moacompress.search.predict.surrogate import Surrogate
from moacompress.search.problem.solver import pareto, solve


def instance(layers: int, kv_heads: int, lengths: tuple[int, ...], seed: int) -> tuple[Floats, Ints]:
    """Costs like a profile's: heavy-tailed over heads, monotone over nested rules."""
    rng = np.random.default_rng(seed)
    rules = candidate_rules(max(lengths), (4, 16, 64), 32)
    shape = ModelShape("llama", layers, kv_heads, kv_heads, 64, "float32", (None,) * layers, "w")
    sizes = candidate_kv_bytes(shape, rules, 32, lengths)
    gone = 1 - sizes / sizes[..., :1]
    weight = np.exp(rng.normal(-6, 3, (layers, kv_heads, 1)))
    noise = np.exp(rng.normal(0, 1, gone.shape))
    influence = weight * gone ** rng.uniform(1, 6, (layers, kv_heads, 1)) * noise
    costs = Surrogate.build(influence, rules, 32, max(lengths)).costs()
    return costs.reshape(-1, len(rules)), sizes.reshape(len(lengths), -1, len(rules))


def used(sizes: Ints, choice: Ints) -> Ints:
    return np.asarray(sizes[:, np.arange(len(choice)), choice].sum(axis=1))


def brute_force(costs: Floats, sizes: Ints, limits: Ints) -> float:
    best = np.inf
    for choice in itertools.product(range(costs.shape[1]), repeat=costs.shape[0]):
        if (used(sizes, np.array(choice)) <= limits).all():
            best = min(best, costs[np.arange(len(choice)), choice].sum())
    return best


def exact_cost(costs: Floats, sizes: Ints, limits: Ints) -> float:
    """Returns the least cost by mixed-integer programming, to a relative 1e-6; infinity where nothing fits."""
    heads, rules = np.divmod(np.arange(costs.size), costs.shape[1])
    one_each = sparse.csr_array((np.ones(costs.size), (heads, np.arange(costs.size))))
    scale, unit = costs.max() or 1.0, np.gcd.reduce(sizes, axis=None)
    found = optimize.milp(
        costs.reshape(-1) * (1e6 / scale),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(sparse.csr_array(sizes[:, heads, rules] // unit), -np.inf, limits // unit),
        ],
        integrality=np.ones(costs.size),
        bounds=optimize.Bounds(0, 1),
        options={"mip_rel_gap": 1e-6},
    )
    return np.inf if found.x is None else float(costs.reshape(-1)[found.x > 0.5].sum())


def random_tiny(seed: int, heads: int, rules: int, lengths: int) -> tuple[Floats, Ints, Ints]:
    rng = np.random.default_rng(seed)
    costs = np.exp(rng.normal(0, 3, (heads, rules))) * (rng.random((heads, rules)) > 0.1)
    sizes = 16 * rng.integers(0, 9, (lengths, heads, rules))
    smallest, largest = sizes.min(2).sum(1), sizes.max(2).sum(1)
    limits = (smallest + rng.random(lengths) * (largest - smallest)).astype(np.int64)
    return costs, sizes, limits


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_tiny_instances_against_brute_force(seed: int, heads: int, rules: int, lengths: int) -> None:
    costs, sizes, limits = random_tiny(seed, heads, rules, lengths)
    best = brute_force(costs, sizes, limits)
    if not np.isfinite(best):
        with pytest.raises(InfeasibleBudgetError):
            solve(costs, sizes, limits)
        return
    found = solve(costs, sizes, limits)
    assert (used(sizes, found.choice) <= limits).all()
    assert found.cost == pytest.approx(costs[np.arange(heads), found.choice].sum())
    assert found.cost >= best * (1 - 1e-9)


@pytest.mark.parametrize("share", [0.6, 0.25, 0.125])
@pytest.mark.parametrize("lengths", [(1024,), (512, 1024), (512, 1024, 2048)])
def test_solve_is_close_to_optimal(lengths: tuple[int, ...], share: float) -> None:
    costs, sizes = instance(10, 4, lengths, seed=len(lengths))
    limits = (sizes.max(axis=2).sum(axis=1) * share).astype(np.int64)
    if (sizes.min(axis=2).sum(axis=1) > limits).any():
        with pytest.raises(InfeasibleBudgetError):
            solve(costs, sizes, limits)
        return
    quick, exact = solve(costs, sizes, limits), exact_cost(costs, sizes, limits)
    assert (used(sizes, quick.choice) <= limits).all()
    assert exact * (1 - 1e-5) <= quick.cost <= exact * 1.01
    assert quick.gap is not None
    assert quick.cost * (1 - quick.gap) <= exact * (1 + 1e-9)


def test_several_limits_can_bind_at_once() -> None:
    """Each of two kinds of rules is dear at one length: both limits decide."""
    rng = np.random.default_rng(0)
    heads = 200
    sizes = np.stack([np.tile([512, 256, 64, 32], (heads, 1)), np.tile([512, 64, 256, 32], (heads, 1))])
    weight = np.exp(rng.normal(0, 2, (heads, 1)))
    costs = weight * np.sort(rng.random((heads, 4)), axis=1) * [0, 1, 1, 2]
    limits = np.array([heads * 120, heads * 150])
    quick = solve(costs, sizes, limits)
    assert (used(sizes, quick.choice) <= limits).all()
    assert quick.cost <= exact_cost(costs, sizes, limits) * 1.01
    assert (used(sizes, quick.choice) > 0.97 * limits).all()


def test_the_least_and_the_most_bytes() -> None:
    costs, sizes = instance(3, 2, (512, 1024), seed=0)
    found = solve(costs, sizes, sizes.max(axis=2).sum(axis=1))
    assert (found.cost, found.gap) == (0.0, 0.0)
    limits = sizes.min(axis=2).sum(axis=1)
    assert (used(sizes, solve(costs, sizes, limits).choice) == limits).all()
    with pytest.raises(InfeasibleBudgetError):
        solve(costs, sizes, limits - 1)


def test_pareto_keeps_one_of_equals_and_the_optimum() -> None:
    costs = np.array([[0.0, 1.0, 1.0, 2.0, 3.0]])
    sizes = np.array([[[9, 5, 5, 7, 1]]])
    assert pareto(costs, sizes).tolist() == [[True, True, False, False, True]]
