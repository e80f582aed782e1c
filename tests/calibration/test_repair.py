"""Repair on tiny models of many families: against least squares of stacked equations, and against the residual it lowers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile.passes import hidden_states
from moacompress.models.least_squares import Normal
from moacompress.models.source import model_shape
from moacompress.repair.projections import (
    OutputProjection,
    output_projections,
    repaired_weights,
    with_weights,
)
from moacompress.rules.plan import Plan
from moacompress.rules.share import Share, with_shared_rules
from moacompress.runtime import attach, detach

Models = Callable[..., PreTrainedModel]


def made(seed: int, count: int = 3, n: int = 150) -> list[Sample]:
    rng = np.random.default_rng(seed)
    mask = np.arange(n) >= n - 10
    return [Sample(rng.integers(3, 150, n), mask, "test", n) for _ in range(count)]


def outputs(model: PreTrainedModel, samples: list[Sample], projection: OutputProjection) -> tuple[Any, Any]:
    """Returns what an output projection gets and gives, `[rows, ...]` float64, over all samples, in whole forwards."""
    rows: list[Any] = []
    handle = projection.module.register_forward_hook(lambda module, inputs, output: rows.append((inputs[0], output)))
    try:
        with torch.no_grad():
            for sample in samples:
                hidden_states(model, model.get_input_embeddings()(torch.from_numpy(sample.input_ids)[None]))
    finally:
        handle.remove()
    x, y = (torch.cat([pair[side].flatten(0, -2) for pair in rows]).double() for side in (0, 1))
    return x, y


def test_the_solution_is_that_of_stacked_equations() -> None:
    torch.manual_seed(0)
    x, residual, weights = torch.randn(2500, 12), torch.randn(2500, 5), torch.rand(2500)
    normal = Normal(12, 5, torch.device("cpu"))
    normal.add(x[:1700], residual[:1700], weights[:1700])
    normal.add(x[1700:], residual[1700:], weights[1700:])
    root = weights.sqrt()[:, None].double()
    ridge = 0.3 * ((x.double() * root) ** 2).sum(0).mean()
    a = torch.cat([x * root, ridge.sqrt() * torch.eye(12)])
    b = torch.cat([residual * root, torch.zeros(12, 5)])
    assert torch.allclose(normal.solve(0.3), torch.linalg.lstsq(a, b).solution, atol=1e-6)
    assert not Normal(12, 5, torch.device("cpu")).solve(0.3).any()


def test_every_layer_is_fitted_after_those_before_it(family: str, tiny_model: Models, random_plan: Any) -> None:
    model = tiny_model(family)
    check_layers(model, random_plan(model_shape(model), 5, formats=True))


def test_projections_the_other_way_round_and_shared_attention(tiny_model: Models, random_plan: Any) -> None:
    turned = tiny_model("gpt2", num_key_value_heads=None, intermediate_size=None)
    check_layers(turned, random_plan(model_shape(turned), 5, formats=True))
    model = tiny_model("llama", num_hidden_layers=4)
    plan, shares = random_plan(model_shape(model), 5), (None, None, Share(1, (1, 0)), Share(0, (0, 0)))
    check_layers(model, replace(plan, rules=with_shared_rules(plan.rules, shares), shares=shares))
    (found,) = repaired_weights(model, Plan.full(model_shape(model)), made(2), [0.01], torch.float32)
    for name, tensor in found.items():  # nothing is to be repaired
        assert torch.allclose(tensor, model.state_dict()[name], atol=1e-5), name


def check_layers(model: PreTrainedModel, plan: Plan) -> None:
    """Layer by layer, whole forwards and plain least squares give the same, and the residual falls."""
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    samples, penalty = made(1), 0.01
    (found,) = repaired_weights(model, plan, samples, [penalty], torch.float32)
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    projections = output_projections(model)
    expected: dict[str, torch.Tensor] = {}
    for projection in projections:
        _, target = outputs(model, samples, projection)
        weight, bias = projection.module.weight, projection.module.bias
        # codes flip where a weight differs in the last bit, so the layers before have exactly what was found for them
        with with_weights(model, {name: found[name] for name in expected}):
            attach(model, plan)
            x, given = outputs(model, samples, projection)
            detach(model)
        if bias is not None:
            x = torch.cat([x, torch.ones(len(x), 1)], 1)
        ridge = (penalty * (x**2).sum(0).mean()).sqrt()
        a = torch.cat([x, ridge * torch.eye(x.shape[1])])
        b = torch.cat([target - given, torch.zeros(x.shape[1], target.shape[1])])
        change = torch.linalg.lstsq(a, b).solution
        left = target - given - x @ change
        assert left.square().sum() < 0.99 * (target - given).square().sum(), projection.name
        ours = change[:-1] if bias is not None else change
        ours = ours if isinstance(projection.module, Conv1D) else ours.T
        expected[f"{projection.name}.weight"] = (weight.double() + ours).float()
        if bias is not None:
            expected[f"{projection.name}.bias"] = (bias.double() + change[-1]).float()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name], atol=1e-4), name


def test_penalties_do_not_touch_each_other(tiny_model: Models, random_plan: Any) -> None:
    model = tiny_model("gpt_neox")
    plan, samples = random_plan(model_shape(model), 5), made(3)
    penalties = [0.01, 1.0]
    together = repaired_weights(model, plan, samples, penalties, torch.bfloat16)
    for penalty, weights in zip(penalties, together, strict=True):
        (alone,) = repaired_weights(model, plan, samples, [penalty], torch.bfloat16)
        assert all(torch.equal(weights[name], alone[name]) for name in alone)
        assert {tensor.dtype for tensor in alone.values()} == {torch.bfloat16}
        assert any(name.endswith("dense.bias") for name in alone)


def test_the_models_own_weights_come_back_after_an_error(tiny_model: Models) -> None:
    model = tiny_model("llama")
    name = "model.layers.0.self_attn.o_proj.weight"
    own = model.state_dict()[name].clone()

    def stop() -> None:
        with with_weights(model, {name: torch.zeros_like(own)}):
            assert not model.state_dict()[name].any()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert torch.equal(model.state_dict()[name], own)
