"""Repair of plans and of single copies on tiny models of many families.

Of plans against least squares of stacked equations and the residual that it lowers; of copies against the attention of the
runtime and the repair of a plan in which one layer copies.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile.passes import all_attended, hidden_states
from moacompress.models import least_squares
from moacompress.models.least_squares import Normal
from moacompress.models.source import model_shape
from moacompress.repair.copies import JUDGING, PENALTY, copied, repaired_copies
from moacompress.repair.projections import OutputProjection, output_projections, repaired_weights, with_weights
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.share import Share, with_shared_rules
from moacompress.runtime import attach, detach
from tests.calibration.conftest import random_samples

if TYPE_CHECKING:
    from tests.calibration.conftest import Models

FAMILIES = ("llama", "phi3", "gpt_neox", "gpt_oss", "qwen3")


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
    (found,) = repaired_weights(model, Plan.full(model_shape(model)), random_samples(2), [0.01], torch.float32)
    for name, tensor in found.items():  # nothing is to be repaired
        assert torch.allclose(tensor, model.state_dict()[name], atol=1e-5), name


def check_layers(model: PreTrainedModel, plan: Plan) -> None:
    """Layer by layer, whole forwards and plain least squares give the same, and the residual falls."""
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    samples, penalty = random_samples(1), 0.01
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
    plan, samples = random_plan(model_shape(model), 5), random_samples(3)
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


def one_copy(shape: ModelShape) -> tuple[int, Share]:
    """Returns the last layer that can copy an earlier one, with its KV heads turned around."""
    natives = shape.native_windows
    layer, anchor = max(
        (layer, anchor) for layer in range(shape.layers) for anchor in range(layer) if natives[layer] == natives[anchor]
    )
    return layer, Share(anchor, tuple(reversed(range(shape.kv_heads))))


def with_copy(shape: ModelShape, layer: int, share: Share) -> Plan:
    shares = tuple(share if index == layer else None for index in range(shape.layers))
    return Plan(shape, 32, ((Rule.FULL,) * shape.kv_heads,) * shape.layers, shares=shares)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_copy_attends_to_is_what_the_runtime_computes(family: str, tiny_model: Models) -> None:
    model = tiny_model(family)
    shape = model_shape(model)
    layer, share = one_copy(shape)
    (sample,) = random_samples(0, 1)
    attended = all_attended(model, shape, torch.from_numpy(sample.input_ids))
    found = copied(attended[layer], attended[share.anchor], share)
    attach(model, with_copy(shape, layer, share))
    x, _ = outputs(model, [sample], output_projections(model)[layer])
    detach(model)
    assert torch.allclose(found, x.float().reshape(found.shape), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_repair_of_a_plan_in_which_one_layer_copies(family: str, tiny_model: Models) -> None:
    model = tiny_model(family)
    shape = model_shape(model)
    layer, share = one_copy(shape)
    samples = random_samples(1, 5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = repaired_copies(model, shape, [(layer, share)], samples, torch.float32)[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    fitted = [sample for number, sample in enumerate(samples) if (number + 1) % JUDGING]
    plan = with_copy(shape, layer, share)
    whole = repaired_weights(model, plan, fitted, [PENALTY], torch.float32)[0]
    assert 0 < found.left < 1
    assert found.weights
    for name, tensor in found.weights.items():
        assert torch.allclose(tensor, whole[name], atol=1e-4)
        assert not torch.allclose(tensor, before[name], atol=1e-4)


@pytest.mark.parametrize("memory", [2**31, 1])
def test_copies_do_not_mix(memory: int, tiny_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_squares, "MAX_BYTES", memory)  # with little of it there is a pass for each
    model = tiny_model("llama")
    shape = model_shape(model)
    copies = [(2, Share(1, (0, 1))), (1, Share(0, (1, 0))), (2, Share(0, (1, 1)))]
    together = repaired_copies(model, shape, copies, random_samples(2, 5), torch.float32)
    for copy, found in zip(copies, together, strict=True):
        alone = repaired_copies(model, shape, [copy], random_samples(2, 5), torch.float32)[0]
        assert found.left == pytest.approx(alone.left)
        for name, tensor in alone.weights.items():
            assert torch.equal(found.weights[name], tensor)


def test_layers_alike_need_no_repair(tiny_model: Models) -> None:
    """A layer whose attention is its anchor's already changes nothing, and nothing is left."""
    model = tiny_model("llama")
    layers = model.model.layers  # type: ignore[attr-defined]
    layers[2].load_state_dict(layers[1].state_dict())
    for name in ("self_attn.o_proj", "mlp.down_proj"):  # layer 1 then adds nothing, and layer 2 reads what it read
        layers[1].get_submodule(name).weight.data.zero_()
    shape = model_shape(model)
    found = repaired_copies(model, shape, [(2, Share(1, (0, 1)))], random_samples(3, 5), torch.float32)[0]
    assert torch.allclose(
        found.weights["model.layers.2.self_attn.o_proj.weight"], layers[2].self_attn.o_proj.weight, atol=1e-6
    )
    assert found.left <= 1
