"""Rounds: what is profiled around a plan, how far one round goes, and that finished samples are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moacompress.calibration import profiler
from moacompress.calibration.profiler import profile as profile_model
from moacompress.calibration.samples import Sample
from moacompress.calibration.statistics import Statistics
from moacompress.calibration.store import Profile
from moacompress.core.progress import SILENT
from moacompress.models.source import SourceModel
from moacompress.recipe import Recipe
from moacompress.search import rounds
from moacompress.search.knapsack import Knapsack, chosen_plan
from moacompress.search.objective import Objective
from moacompress.search.quadratic import KNEE, Quadratic
from moacompress.search.rounds import NEUTRAL, RANGES, STARTS, ProfileAround, choice_of, moved, spread_samples
from moacompress.search.search_request import SearchRequest

Profiles = Callable[..., Profile]


@pytest.fixture(scope="module")
def profiled(
    source: SourceModel, random_samples: Callable[..., list[Sample]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Profile]:
    recipe = Recipe.from_dict(
        {"calibration": {"lengths": [192, 256], "samples": 4, "validation_samples": 2}, "profile": {"draws": 1}}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moacompress.calibration.sample_sources.build_samples", random_samples)
        yield profile_model(source, tmp_path_factory.mktemp("profile") / "p", recipe)


def test_around_is_what_the_profiler_says_around_the_plan(
    source: SourceModel, profiled: Profile, tmp_path: Path
) -> None:
    samples = profiled.calibration_samples()
    assert len(samples) == 4
    choice = np.full((3, 2), 3)
    plan = chosen_plan(profiled, choice)
    forms = ProfileAround(profiled, profiled.recipe, source, samples, None)(plan, SILENT)
    form = forms(0.0)
    assert form.harm(choice) == 0
    assert forms(1.0).harm(choice) == 0
    changes = form.changes(choice)
    assert changes.shape == (3, 2, len(profiled.rules))
    assert not changes[..., 3].any()
    whole = profile_model(source, tmp_path / "around", profiled.recipe, around=plan)
    assert np.allclose(changes, whole.influence("sample").mean(0), rtol=1e-4, atol=1e-9)
    assert (changes < 0).any()
    assert (changes > 0).any()
    measured = Objective(source.model, samples).harms(plan)
    assert np.allclose(whole.statistics.arrays["harm"][:, 0], measured, rtol=1e-3, atol=1e-9)
    assert measured.min() > 0


def test_finished_samples_are_kept(
    source: SourceModel, profiled: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = chosen_plan(profiled, np.full((3, 2), 3))
    around = ProfileAround(profiled, profiled.recipe, source, profiled.calibration_samples(), tmp_path)
    calls: list[int] = []

    def counted(*arguments: object) -> object:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return profiler.sample_statistics(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(rounds, "sample_statistics", counted)
    with pytest.raises(KeyboardInterrupt):
        around(plan, SILENT)
    calls.clear()
    first = around(plan, SILENT)
    assert len(calls) == 1
    calls.clear()
    assert np.array_equal(around(plan, SILENT)(0.5).linear, first(0.5).linear)
    assert not calls
    other = chosen_plan(profiled, np.full((3, 2), 4))
    with pytest.raises(KeyboardInterrupt):  # another plan is another matter
        around(other, SILENT)


def test_a_round_moves_no_more_than_its_share(profiles: Profiles) -> None:
    profile = profiles()
    request = SearchRequest.of(profile, "50%", profile.recipe)
    knapsack = Knapsack.of(request)
    costs = request.surrogate.costs()
    choice = knapsack.choose(costs)
    rng = np.random.default_rng(0)
    linear = rng.normal(size=(choice.size, len(profile.rules)))
    linear -= linear[np.arange(choice.size), choice.reshape(-1)][:, None]
    form = Quadratic(rng.normal(size=(3, *linear.shape)) * 0.01, linear)
    before = np.take_along_axis(knapsack.sizes, choice[None, ..., None], -1)[..., 0]
    reached = []
    for share in (0.02, 0.1, 1.0):
        end = moved(knapsack, form, {"moved": share, "coherence": 0.9}, choice)
        after = np.take_along_axis(knapsack.sizes, end[None, ..., None], -1)[..., 0]
        assert (after.sum((1, 2)) <= knapsack.limits).all()
        assert np.abs(after - before)[-1].sum() <= 2 * share * knapsack.limits[-1]
        reached.append(form.harm(end) - form.harm(choice))
    assert 0 >= reached[0] > reached[1] > reached[2]
    worse = Quadratic(np.zeros((1, *linear.shape)), np.abs(linear))
    assert np.array_equal(moved(knapsack, worse, STARTS[0], choice), choice)  # nothing helps
    assert moved(knapsack, form, NEUTRAL, choice) is choice
    nothing = Quadratic(np.zeros((1, *linear.shape)), np.zeros(linear.shape))
    assert np.array_equal(moved(knapsack, nothing, STARTS[0], choice), choice)
    assert np.array_equal(choice_of(profile, chosen_plan(profile, choice)), choice)


def test_a_relative_form_is_of_the_logarithm(profiles: Profiles) -> None:
    """The gradient of the mean logarithm is that of the harm, each sample's over its own harm."""
    profile = profiles()
    rng = np.random.default_rng(0)
    count, *size = profile.statistics.arrays["squares"].shape
    harm, first = np.exp(rng.normal(-2, 2, (count, 1))), rng.normal(size=(count, *size))
    arrays = {"total": rng.normal(size=(count, 1, *size)), "first": first, "harm": harm}
    around = replace(
        profile, around="plan", statistics=Statistics({k: v.astype(np.float32) for k, v in arrays.items()})
    )

    def weighted(weights: np.ndarray) -> np.ndarray:
        return np.tensordot(weights / weights.sum(), first, axes=1).reshape(-1, size[-1])

    mean, relative = (Quadratic.of(around, 0.25, share).linear for share in (0.0, 1.0))
    assert np.allclose(mean, weighted(np.ones(count)), atol=1e-5)
    scale = (harm + KNEE).mean()
    assert np.allclose(
        relative, scale * np.tensordot(1 / (harm[:, 0] + KNEE), first, axes=1).reshape(mean.shape) / count, rtol=1e-4
    )
    dense = replace(profile, statistics=Statistics({"total": arrays["total"].astype(np.float32)}))
    assert np.array_equal(Quadratic.of(dense, 0.25, 1.0).rows, Quadratic.of(dense, 0.25).rows)


def test_what_a_round_starts_with_is_in_reach() -> None:
    for knobs in (NEUTRAL, *STARTS):
        assert set(knobs) == set(RANGES)
        assert all(low <= knobs[name] <= high for name, (low, high) in RANGES.items())


def test_forms_are_joined_by_their_rows() -> None:
    rng = np.random.default_rng(0)
    one, other = (Quadratic(rng.normal(size=(rows, 4, 5)), rng.normal(size=(4, 5))) for rows in (30, 10))
    choice = rng.integers(0, 5, (2, 2))
    assert one.joined(other).harm(choice) == pytest.approx(0.75 * one.harm(choice) + 0.25 * other.harm(choice))
    base = one.harm(choice)
    for layer, head, rule in ((0, 0, 1), (1, 1, 4)):
        changed = choice.copy()
        changed[layer, head] = rule
        assert one.changes(choice)[layer, head, rule] == pytest.approx(one.harm(changed) - base)


def test_samples_are_spread(profiles: Profiles) -> None:
    samples = profiles(samples=9).validation
    assert spread_samples(samples, 3) == [samples[0], samples[4], samples[8]]
    assert spread_samples(samples, 20) == samples
    assert spread_samples(samples, 1) == samples[:1]
