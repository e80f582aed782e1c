"""Repair of single copies: against the runtime's attention, and against the repair of a plan in which one layer copies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile.passes import all_attended
from moacompress.models import least_squares
from moacompress.models.source import model_shape
from moacompress.repair.copies import JUDGING, PENALTY, copied, repaired_copies
from moacompress.repair.projections import output_projections, repaired_weights
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.share import Share
from moacompress.runtime import attach, detach

Models = Callable[..., PreTrainedModel]
FAMILIES = ("llama", "phi3", "gpt_neox", "gpt_oss", "qwen3")


def made(seed: int, count: int = 5, n: int = 150) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [Sample(rng.integers(3, 150, n), np.arange(n) >= n - 10, "test", n) for _ in range(count)]


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
    ids = torch.from_numpy(made(0)[0].input_ids)
    attended = all_attended(model, shape, ids)
    found = copied(attended[layer], attended[share.anchor], share)
    seen: list[torch.Tensor] = []
    module = output_projections(model)[layer].module
    attach(model, with_copy(shape, layer, share))
    handle = module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        with torch.no_grad():
            model(ids[None], use_cache=False)
    finally:
        handle.remove()
        detach(model)
    assert torch.allclose(found, seen[0].reshape(found.shape), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_repair_of_a_plan_in_which_one_layer_copies(family: str, tiny_model: Models) -> None:
    model = tiny_model(family)
    shape = model_shape(model)
    layer, share = one_copy(shape)
    samples = made(1)
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
    together = repaired_copies(model, shape, copies, made(2), torch.float32)
    for copy, found in zip(copies, together, strict=True):
        alone = repaired_copies(model, shape, [copy], made(2), torch.float32)[0]
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
    found = repaired_copies(model, shape, [(2, Share(1, (0, 1)))], made(3), torch.float32)[0]
    assert torch.allclose(
        found.weights["model.layers.2.self_attn.o_proj.weight"], layers[2].self_attn.o_proj.weight, atol=1e-6
    )
    assert found.left <= 1
