"""What is profiled around a plan, and that finished samples are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moacompress.calibration.profile.sample_statistics import sample_statistics
from moacompress.calibration.profile.store import Profile
from moacompress.core.arrays import Floats
from moacompress.core.errors import PlanError
from moacompress.core.progress import SILENT
from moacompress.models.source import SourceModel
from moacompress.recipe import Recipe
from moacompress.search.measure.claims import Claims, open_claims
from moacompress.search.measure.objective import Objective
from moacompress.search.measure.storages import quiet_optuna
from moacompress.search.predict import around as around_module
from moacompress.search.predict.around import ProfileAround
from moacompress.search.problem.knapsack import choice_of, chosen_plan

Profiles = Callable[..., Profile]


@pytest.fixture
def claims() -> Iterator[Claims]:
    with quiet_optuna(), open_claims(None, "s", alone=True) as opened:
        yield opened


RECIPE = Recipe.from_dict(
    {"calibration": {"lengths": [192, 256], "samples": 4, "validation_samples": 2}, "profile": {"draws": 1}}
)


@pytest.fixture(scope="module")
def profiled(
    source: SourceModel, random_profile: Callable[..., Profile], tmp_path_factory: pytest.TempPathFactory
) -> Profile:
    return random_profile(source, tmp_path_factory.mktemp("profile") / "p", RECIPE)


@pytest.fixture(scope="module")
def gated(
    source: SourceModel, random_profile: Callable[..., Profile], tmp_path_factory: pytest.TempPathFactory
) -> Profile:
    recipe = RECIPE.override(profile__gates=True, profile__gate_samples=2)
    return random_profile(source, tmp_path_factory.mktemp("gated") / "p", recipe)


def squared_sums(profile: Profile) -> Floats:
    """What each rule changes by half the square of its sum over a sample's rows, mean over lengths."""
    moved = (profile.of_parts("total") ** 2).mean(1) / 2 + profile.of_parts("first")
    found = np.mean([moved[profile.samples_of(n, "answer")].mean(0) for n in profile.lengths], axis=0)
    return found if profile.parts is None else found[..., profile.parts].sum(-1)


def test_around_is_what_the_profiler_says_around_the_plan(
    source: SourceModel, profiled: Profile, random_profile: Callable[..., Profile], claims: Claims, tmp_path: Path
) -> None:
    samples = profiled.calibration_samples()
    assert len(samples) == 4
    choice = np.full((3, 2), 3)
    plan = chosen_plan(profiled, choice)
    forms = ProfileAround(profiled, profiled.recipe, source, samples, claims)(plan, SILENT)
    form = forms(0.0)
    assert form.kl(choice) == 0
    assert forms(1.0).kl(choice) == 0
    changes = form.changes(choice)
    assert changes.shape == (3, 2, len(profiled.rules))
    assert not changes[..., 3].any()
    whole = random_profile(source, tmp_path / "around", profiled.recipe, around=plan)
    assert np.allclose(changes, squared_sums(whole), rtol=1e-4, atol=1e-9)
    assert (changes < 0).any()
    assert (changes > 0).any()
    measured = Objective(source.model, samples).kls(plan)
    assert np.allclose(whole.statistics.arrays["harm"][:, 0], measured, rtol=1e-3, atol=1e-9)
    assert measured.min() > 0


def test_around_a_plan_whose_gates_choose(
    source: SourceModel,
    gated: Profile,
    random_profile: Callable[..., Profile],
    claims: Claims,
    tmp_path: Path,
) -> None:
    choosing = [number for number, rule in enumerate(gated.rules) if rule.selects]
    choice = np.array([[choosing[0], choosing[-1]], [0, choosing[len(choosing) // 2]], [3, choosing[7]]])
    plan = chosen_plan(gated, choice)
    assert plan.selects
    samples = gated.calibration_samples()
    form = ProfileAround(gated, gated.recipe, source, samples, claims)(plan, SILENT)(0.0)
    assert form.kl(choice) == 0
    changes = form.changes(choice)
    assert not np.take_along_axis(changes, choice[..., None], -1).any()
    # the plan's gates are there, whatever a recipe trains
    recipe = gated.recipe.override(profile__gates=True)
    whole = random_profile(source, tmp_path / "around", recipe, around=plan)
    assert whole.rules == gated.rules
    assert whole.gates is not None
    assert whole.gates.weights.fingerprint == plan.gates
    assert np.allclose(changes, squared_sums(whole), rtol=1e-4, atol=1e-9)
    measured = Objective(source.model, samples).kls(plan)  # as the cache keeps it
    assert np.allclose(whole.statistics.arrays["harm"][:, 0], measured, rtol=1e-3, atol=1e-9)
    assert measured.min() > 0
    again = random_profile(source, tmp_path / "around", recipe.override(profile__gate_samples=9), around=plan)
    assert again.fingerprint == whole.fingerprint
    with pytest.raises(PlanError, match=f"the gates {plan.gates} choose, and these are not at hand"):
        random_profile(source, tmp_path / "none", recipe, around=replace(plan, gate_weights=None))
    assert not (tmp_path / "none").exists()


def test_around_a_plan_of_formats(
    source: SourceModel,
    profiled: Profile,
    random_profile: Callable[..., Profile],
    claims: Claims,
    tmp_path: Path,
) -> None:
    """Changes of a span, of the keys' format and of the values' are each as a profile around the plan has them."""
    formats = ("int8", "int4")
    offered = profiled.offering(formats)
    rules, spans = offered.rules, len(offered.spans)
    choice = np.array([[spans + 3, 3], [len(rules) - 1, 0], [2 * spans + 5, len(rules) - spans]])
    plan = chosen_plan(offered, choice)
    assert np.array_equal(choice_of(offered, plan), choice)
    samples = offered.calibration_samples()
    forms = ProfileAround(offered, offered.recipe, source, samples, claims)(plan, SILENT)
    form = forms(0.0)
    assert form.kl(choice) == 0
    changes = form.changes(choice)
    assert changes.shape == (3, 2, len(rules))
    whole = random_profile(source, tmp_path / "around", profiled.recipe, around=plan).offering(formats)
    predicted = squared_sums(whole)
    for layer, head in np.ndindex(3, 2):
        now = rules[choice[layer, head]]
        assert changes[layer, head, choice[layer, head]] == 0
        for number, rule in enumerate(rules):
            kept = (rule.sink, rule.alpha, rule.beta_q) == (now.sink, now.alpha, now.beta_q)
            if [kept, rule.key_format == now.key_format, rule.value_format == now.value_format].count(False) == 1:
                one = changes[layer, head, number]
                assert one == pytest.approx(predicted[layer, head, number], rel=1e-3, abs=1e-8)
    assert whole.statistics.arrays["harm"].min() > 0
    again = ProfileAround(offered, offered.recipe, source, samples, claims)(plan, SILENT)
    assert np.array_equal(again(0.5).linear, forms(0.5).linear)


def test_finished_samples_are_kept(
    source: SourceModel, profiled: Profile, claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = chosen_plan(profiled, np.full((3, 2), 3))
    around = ProfileAround(profiled, profiled.recipe, source, profiled.calibration_samples(), claims)
    calls: list[int] = []

    def counted(*arguments: object) -> object:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return sample_statistics(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(around_module, "sample_statistics", counted)
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
