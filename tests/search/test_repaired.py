"""The choice of a repair: what is kept lowers KL on samples that it was not fitted to, or nothing is changed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moacompress.calibration.data.samples import Sample
from moacompress.core.errors import DataError, ModelError
from moacompress.models.source import SourceModel
from moacompress.repair import plans as repairing
from moacompress.repair.plans import repair, repair_by_profile
from moacompress.repair.projections import with_weights
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.search.measure.objective import Objective
from tests.search.conftest import make_profile


def made(seed: int, count: int, n: int = 120) -> list[Sample]:
    rng = np.random.default_rng(seed)
    mask = np.arange(n) >= n - 60
    return [Sample(rng.integers(3, 150, n), mask, "test", n) for _ in range(count)]


@pytest.fixture
def narrow(source: SourceModel) -> Plan:
    return Plan.uniform(source.shape, Rule(4, 16, 0), 16)


def test_it_lowers_kl_where_it_was_not_fitted(source: SourceModel, narrow: Plan) -> None:
    own = {name: tensor.clone() for name, tensor in source.model.state_dict().items()}
    validation = made(8, 12)
    done = repair(source, narrow, made(7, 60), validation, penalties=[0.03, 100.0])
    assert all(torch.equal(tensor, own[name]) for name, tensor in source.model.state_dict().items())
    report = done.report
    assert (report["penalty"], report["tokens"], report["samples"]) == (0.03, 7200, 60)
    assert report["validation_samples"] == 6
    judged = Objective(source.model, validation[1::2])
    before = judged.kls(narrow)
    with with_weights(source.model, done.weights):
        after = kls_against(own, source, narrow, validation[1::2])
    assert np.mean(after) < np.mean(before)
    assert report["harm"]["before"]["mean"] == pytest.approx(np.mean(before), rel=1e-4)
    assert report["harm"]["after"]["mean"] == pytest.approx(np.mean(after), rel=1e-4)
    assert report["harm"]["change"]["error"] == pytest.approx(np.std(after - before, ddof=1) / 6**0.5, rel=1e-3)
    assert report["harm"]["change"]["p"] == 2 / 2**6


def kls_against(own: dict[str, Any], source: SourceModel, plan: Plan, samples: list[Sample]) -> np.ndarray[Any, Any]:
    """Returns the KL of the model as it is against the one with its own weights."""
    objective = Objective(source.model, samples)
    with with_weights(source.model, {name: own[name] for name, _ in source.model.named_parameters()}):
        objective.kls(Plan.full(source.shape))  # keeps the dense logits
    return objective.kls(plan)


def test_none_is_kept_where_it_hurts(source: SourceModel, narrow: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    worse = {name: torch.randn_like(source.model.state_dict()[name])}
    monkeypatch.setattr(repairing, "repaired_weights", lambda *args: [worse])
    done = repair(source, narrow, made(1, 2), made(2, 4), penalties=[0.1])
    assert done.weights == {}
    assert (done.report["penalty"], done.report["harm"]["change"]["mean"]) == (None, 0)
    assert "not_enough" not in done.report["harm"]  # none was chosen, so none was judged


def test_none_is_kept_that_the_other_half_does_not_confirm(
    source: SourceModel, narrow: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(*kls: float) -> Any:
        class RepairedKl:
            def __init__(self, *args: Any) -> None:
                self.numbers = [*range(len(kls))]

            def under(self, weights: Any, numbers: Any = None) -> np.ndarray[Any, Any]:
                return np.arange(1.0, 1 + len(kls)) if not weights else np.array(kls)

        monkeypatch.setattr(repairing, "_RepairedKl", RepairedKl)
        monkeypatch.setattr(repairing, "repaired_weights", lambda *args: [{"weight": torch.ones(1)}])
        return repair(source, narrow, made(1, 2), made(2, 4), penalties=[0.1])

    def changed(*judged: float) -> list[float]:
        """Returns KLs of which those that choose are lower, and those that judge differ by so much."""
        return [before + change for before, change in enumerate(np.ravel([(-0.5, one) for one in judged]), 1)]

    worse, better_in_one_of_six = (0.5,) * 6, (-1.0, 0.1, -0.1, 0.1, -0.1, -0.1)
    three_alike = (-0.5, -0.51, -0.49)  # by 87 standard errors, of three samples
    for doubtful in (worse, better_in_one_of_six, three_alike):
        done = kept(*changed(*doubtful))
        assert done.weights == {}
        assert done.report["penalty"] is None
        assert done.report["harm"]["change"]["mean"] == 0
        assert done.report["harm"]["not_enough"]["mean"] == pytest.approx(np.mean(doubtful))
        assert done.report["harm"]["not_enough"]["p"] >= 0.05 or done.report["harm"]["not_enough"]["mean"] > 0
    assert kept(0.1, 0.1, 0.1).report["penalty"] is None  # one sample judges
    done = kept(*changed(-0.5, -0.6, -0.5, -0.1, -0.5, -0.5))
    assert done.report["penalty"] == 0.1
    assert "not_enough" not in done.report["harm"]


def test_a_plan_of_full_rules_is_not_worked_on(source: SourceModel) -> None:
    done = repair(source, Plan.full(source.shape), made(1, 2), made(2, 2))
    assert done.weights == {}
    assert "did not" not in done.report
    assert done.report["penalty"] is None


def test_too_few_samples(source: SourceModel, narrow: Plan) -> None:
    with pytest.raises(DataError, match="no calibration samples"):
        repair(source, narrow, [], made(2, 2))
    with pytest.raises(DataError, match="there are 1; profile with more --validation-samples"):
        repair(source, narrow, made(1, 1), made(2, 1))


def test_a_profile_of_another_model(source: SourceModel, narrow: Plan) -> None:
    profile = make_profile()
    assert profile.shape.weights_fingerprint != source.shape.weights_fingerprint
    with pytest.raises(ModelError, match="or repair with the model that was profiled"):
        repair_by_profile(source, narrow, profile)


def test_samples_are_taken_from_all_over(source: SourceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [replace(sample, source=str(number)) for number, sample in enumerate(made(3, 10))]
    profile: Any = SimpleNamespace(calibration_samples=lambda: samples)
    for wanted, expected in ((350, ["0", "4", "9"]), (10**6, [*map(str, range(10))])):
        monkeypatch.setattr(repairing, "TOKENS_PER_INPUT", wanted / (source.shape.heads * source.shape.head_dim))
        assert [sample.source for sample in repairing.repair_samples(profile, source.shape)] == expected
