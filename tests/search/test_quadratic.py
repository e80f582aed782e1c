"""The quadratic form: it is the definition, and the local search ends where no change of one or two KV heads helps."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from moacompress.calibration.profile.statistics import Statistics
from moacompress.calibration.profile.store import Profile
from moacompress.rules.formats import CODED
from moacompress.search.predict.search_parameters import START_COHERENCE
from moacompress.search.problem.knapsack import total_cost
from moacompress.search.problem.quadratic import Quadratic
from moacompress.search.search_request import MIN_ROWS, SearchRequest
from tests.search.conftest import make_profile


def coherent(samples: int = 40, text: int = 0, seed: int = 0) -> Profile:
    """A small profile in which KV heads act together: what one moves another moves too, or moves back."""
    profile = make_profile(layers=2)
    rng = np.random.default_rng(seed)
    size = np.sqrt(profile.statistics.arrays["squares"][0]).astype(np.float64)  # [layers, kv_heads, rules]
    common = rng.normal(size=(samples + text, 2, 1, 1, 1)) * rng.choice([-1, 1], (1, 1, *size.shape[:2], 1))
    totals = (size * (common + 0.3 * rng.normal(size=(samples + text, 2, *size.shape[:2], 1)))).astype(np.float32)
    squares = (totals**2).mean(1)
    return replace(
        profile,
        sample_lengths=np.resize(profile.lengths, samples + text).astype(np.int64),
        sample_kinds=("answer",) * samples + ("text",) * text,
        statistics=Statistics({"squares": squares, "total": totals}),
    )


def test_it_is_half_the_mean_square_of_the_sum() -> None:
    profile = coherent(samples=21, text=5)
    form = Quadratic.of(profile)
    rng = np.random.default_rng(1)
    choice = rng.integers(0, len(profile.rules), (2, 2))
    picked = np.take_along_axis(profile.statistics.arrays["total"], choice[None, None, ..., None], -1)[..., 0]
    squares = (picked.astype(np.float64).sum((2, 3)) ** 2).mean(1) / 2
    kinds, wanted = np.array(profile.sample_kinds), 0.0
    for kind, weight in (("answer", 2 / 3), ("text", 1 / 3)):
        means = [squares[(kinds == kind) & (profile.sample_lengths == n)].mean() for n in profile.lengths]
        wanted += weight * float(np.mean(means))
    assert form.kl(choice) == pytest.approx(wanted)
    few = coherent(samples=MIN_ROWS // 2 - 1)
    assert SearchRequest.of(few, "50%", few.recipe).quadratic is None


@pytest.mark.parametrize("seed", range(4))
def test_no_change_of_one_or_two_heads_improves_the_end(seed: int) -> None:
    profile = coherent(seed=seed)
    request = SearchRequest.of(profile, "50%", profile.recipe)
    knapsack = request.space().knapsack
    form, costs, share = request.quadratic, request.surrogate.costs(), 0.6
    assert form is not None

    def value(choice: np.ndarray) -> float:
        return (1 - share) * total_cost(costs, choice) + share * form.kl(choice)

    def fits(choice: np.ndarray) -> bool:
        used = np.take_along_axis(knapsack.sizes, choice[None, ..., None], -1).sum((1, 2, 3))
        return bool((used <= knapsack.limits).all())

    start = knapsack.choose(costs)
    end = form.refined(start, costs, share, knapsack)
    assert fits(end)
    assert value(end) <= value(start)
    heads = list(itertools.product(range(2), range(2)))
    rules = range(len(profile.rules))
    for first, second in itertools.combinations(heads, 2):
        for a, b in itertools.product(rules, rules):
            other = end.copy()
            other[first], other[second] = a, b
            assert not fits(other) or value(other) >= value(end) - 1e-8
    assert np.array_equal(form.refined(start, costs, 0.0, knapsack), start)


def test_rules_of_parts_are_as_rules_of_their_own() -> None:
    profile = make_profile(layers=2, formats=True).offering(CODED)
    form = Quadratic.of(profile)
    assert form.parts is not None
    assert form.rows.shape[2] == len(profile.spans) + 2 * (1 + len(CODED))
    whole = Quadratic(form.rows[..., form.parts].sum(-1))
    request = SearchRequest.of(profile, "25%", profile.recipe)
    knapsack, costs = request.space().knapsack, request.surrogate.costs()
    rng = np.random.default_rng(0)
    for choice in (knapsack.choose(costs), rng.integers(0, len(profile.rules), (2, 2))):
        assert form.kl(choice) == pytest.approx(whole.kl(choice))
        np.testing.assert_allclose(form.changes(choice), whole.changes(choice), rtol=1e-6, atol=1e-9)
    start = knapsack.choose(costs)
    end = form.refined(start, costs, 0.6, knapsack)
    assert np.array_equal(end, whole.refined(start, costs, 0.6, knapsack))


def test_the_study_has_a_parameter_for_it() -> None:
    profile = coherent()
    request = SearchRequest.of(profile, "50%", profile.recipe)
    assert request.parameters.starts == [{**request.parameters.neutral, "coherence": START_COHERENCE}]
    space = request.space()
    neutral = request.choice(space, request.parameters.neutral)
    assert np.array_equal(neutral, space.knapsack.choose(request.surrogate.costs()))
    bent = request.choice(space, request.parameters.starts[0])
    assert request.quadratic is not None
    assert request.quadratic.kl(bent) < request.quadratic.kl(neutral)
    few = SearchRequest.of(coherent(samples=8), "50%", profile.recipe)
    assert few.parameters.starts == []
    assert "coherence" not in few.parameters.ranges


def test_changes_are_those_of_the_kl() -> None:
    rng = np.random.default_rng(0)
    form = Quadratic(rng.normal(size=(30, 4, 5)))
    choice = rng.integers(0, 5, (2, 2))
    base = form.kl(choice)
    for layer, head, rule in ((0, 0, 1), (1, 1, 4)):
        changed = choice.copy()
        changed[layer, head] = rule
        assert form.changes(choice)[layer, head, rule] == pytest.approx(form.kl(changed) - base)
