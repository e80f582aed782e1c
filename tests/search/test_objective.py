from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile.passes import answer_logits
from moacompress.core.errors import DataError, ModelError
from moacompress.models.kl import kl_divergence
from moacompress.models.source import model_shape
from moacompress.repair.projections import with_weights
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.runtime import attach, detach
from moacompress.search.measure import objective
from moacompress.search.measure.objective import Objective
from tests.conftest import tiny_model


@pytest.fixture
def samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        Sample(rng.integers(3, 150, n).astype(np.int64), np.isin(np.arange(n), [n // 2, n - 2, n - 1]), "text", 256)
        for n in (150, 200, 200)
    ]


def test_kl_of_the_full_plan_is_nothing_and_of_a_sparse_one_is_by_hand(samples: list[Sample]) -> None:
    model = tiny_model("llama")
    shape = model_shape(model)
    ids = torch.from_numpy(samples[0].input_ids)[None]
    before = model(ids).logits
    measure = Objective(model, samples)
    assert measure.kls(Plan.full(shape)).max() < 1e-8
    sparse = Plan.uniform(shape, Rule(4, 32, 0), 32)
    kls = measure.kls(sparse)
    assert kls.shape == (3,)
    assert (kls > 1e-4).all()
    assert measure.kls(sparse, [2]) == pytest.approx(kls[2:], rel=1e-6)
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)

    attach(model, sparse)
    under = model(ids, use_cache=False).logits
    detach(model)
    rows = np.flatnonzero(samples[0].answer_mask) - 1
    p, q = before[0, rows].double().log_softmax(-1), under[0, rows].double().log_softmax(-1)
    assert kls[0] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_a_plan_may_have_weights_of_its_own(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense model never has them, not even where it is asked for again between samples under the plan."""
    model = tiny_model("llama")
    shape = model_shape(model)
    sparse, full = Plan.uniform(shape, Rule(4, 32, 0), 32), Plan.full(shape)
    name = "model.layers.1.self_attn.o_proj.weight"
    weights = {name: 2 * model.get_parameter(name).detach()}
    before = model.get_parameter(name).detach().clone()
    dense = [answer_logits(model, sample) for sample in samples]
    expected = {}
    for plan, given in ((sparse, weights), (full, {})):
        with with_weights(model, given):
            attach(model, plan)
            expected[plan.key()] = [
                kl_divergence(of_dense, answer_logits(model, sample))
                for of_dense, sample in zip(dense, samples, strict=True)
            ]
            detach(model)
    for limit in (2**31, 0):
        monkeypatch.setattr(objective, "MAX_DENSE_BYTES", limit)
        measure = Objective(model, samples, lambda plan: weights if plan == sparse else {})
        for plan in (sparse, full):
            assert measure.kls(plan) == pytest.approx(expected[plan.key()], rel=1e-5, abs=1e-9)
        assert torch.equal(model.get_parameter(name), before)
    assert Objective(model, samples).kls(sparse)[0] != pytest.approx(expected[sparse.key()][0], rel=0.01)


def test_the_model_is_dense_again_after_an_error(samples: list[Sample]) -> None:
    model = tiny_model("llama")
    ids = torch.from_numpy(samples[0].input_ids)[None]
    before = model(ids).logits
    measure = Objective(model, samples)

    def interrupted() -> None:
        with measure.under(Plan.uniform(model_shape(model), Rule(4, 32, 0), 32)) as kl:
            kl(0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)


def test_bad_input(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no validation samples"):
        Objective(None, [])
    model = tiny_model("llama")
    measure = Objective(model, samples)
    measure.kls(Plan.full(model_shape(model)))
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ModelError, match="sample 0 are not finite"):
        measure.kls(Plan.full(model_shape(model)))


def test_processes_that_came_to_other_plans_are_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    def others(values: Any) -> Any:
        return {**values, 1: ("another plan", {1: 0.5})}

    monkeypatch.setattr(objective, "gathered", others)
    assert objective._gathered({0: 0.25}, "another plan") == {0: 0.25, 1: 0.5}
    with pytest.raises(ModelError, match="came to different plans"):
        objective._gathered({0: 0.25}, "a plan")
