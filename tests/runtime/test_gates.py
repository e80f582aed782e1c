"""What models, checkpoints and caches make of gates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moacompress.core.errors import PlanError, UnsupportedError
from moacompress.models.fingerprint import weights_fingerprint
from moacompress.models.source import model_shape
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.runtime import PlanCache, attach, detach
from tests.plan_kinds import gated_plan
from tests.runtime.forwards import in_parts


def test_a_checkpoint_holds_its_gates(
    tiny_folder: Any, tiny_model: Callable[..., Any], token_ids: Any, tmp_path: Any
) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama")
    plan = gated_plan(model, 1)
    before = set(model.state_dict())
    own = weights_fingerprint(model)
    attach(model, plan)
    assert weights_fingerprint(model) == own  # gates are none of its weights
    names = set(model.state_dict()) - before
    assert names
    assert all(name.rpartition(".self_attn.gate.")[2] in ("weight", "bias") for name in names)
    model.save_pretrained(tmp_path / "out")
    ids = token_ids(1, 90)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(loaded(ids, use_cache=False).logits, expected)
    # with gradients on, as loaded: gates learn where they are told to
    assert torch.allclose(loaded(ids).logits, expected, atol=1e-4)
    assert loaded(
        ids, attention_mask=torch.ones_like(ids).index_fill(1, torch.arange(3), 0), use_cache=False
    ).logits.requires_grad
    out = loaded.generate(ids, max_new_tokens=8, num_beams=2, do_sample=False)
    assert out.shape[1] <= 98
    detach(model)
    assert set(model.state_dict()) == before


def test_a_plan_is_attached_by_its_file(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    plan = gated_plan(model, 1)
    plan.save(tmp_path / "plan.json")
    ids = torch.arange(3, 103).unsqueeze(0)
    expected = attach(model, plan)(ids).logits
    assert attach(other, str(tmp_path / "plan.json")) is other
    assert torch.equal(other(ids).logits, expected)
    for name, said in (("missing.json", "No such file"), ("broken.json", "not a moacompress plan")):
        (tmp_path / "broken.json").write_text("{}")
        with pytest.raises(PlanError, match=f"{name}.*{said}"):
            attach(other, tmp_path / name)
    assert torch.equal(other(ids).logits, expected)


def test_what_does_not_go_together_is_refused(tiny_model: Callable[..., Any], tmp_path: Any) -> None:
    model = tiny_model("llama")
    plan = gated_plan(model, 1)
    with pytest.raises(PlanError, match=f"the gates {plan.gates} choose, and these are not at hand"):
        attach(model, Plan.from_dict(plan.to_dict()))
    plan.save(tmp_path / "a.json")
    read = Plan.load(tmp_path / "a.json").gate_weights
    assert read is not None
    assert read.fingerprint == plan.gates
    assert plan.gate_weights is not None
    other = GateWeights(plan.gate_weights.weight + 1, plan.gate_weights.bias)
    other.save(tmp_path / "a.gates.safetensors")
    with pytest.raises(PlanError, match=f"it names {plan.gates}, these are {other.fingerprint}"):
        Plan.load(tmp_path / "a.json")
    attach(model, plan)
    cache = model(torch.ones(1, 40, dtype=torch.int64)).cache
    with pytest.raises(UnsupportedError, match="nothing was kept to roll back to"):
        cache.crop(-1)
    shape = model_shape(tiny_model("gemma3_text"))
    with pytest.raises(PlanError, match="sliding window of its own"):
        Plan.uniform(shape, Rule(4, 20, 0, select_alpha=5))


@pytest.mark.parametrize("formats", [False, True])
@pytest.mark.usefixtures("compiled_kernels")
def test_one_call_for_all_layers_selects_in_bfloat16(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], formats: bool
) -> None:
    """What the layers select one by one, but where the last bits of a product give another code and another choice."""
    model = tiny_model("llama").to(torch.bfloat16)
    plan = gated_plan(model, 11)
    if formats:
        plan = replace(plan, rules=tuple(tuple(rule.in_formats("int8", "int4") for rule in row) for row in plan.rules))
    plan = plan.in_dtype("bfloat16")
    attach(model, plan)
    ids = token_ids(2, 100)
    caches: list[Any] = [PlanCache(plan) for _ in range(2)]
    found = in_parts(model, ids, [40], caches[0])[:, 40:].float()
    handle = model.model.layers[0].register_forward_pre_hook(lambda *given: None)  # so that layers step by themselves
    wanted = in_parts(model, ids, [40], caches[1])[:, 40:].float()
    handle.remove()
    assert caches[0].step_routes == {"all layers": 60 * plan.model.layers}
    assert caches[1].step_routes["all layers"] == 0
    assert (found - wanted).abs().mean() < 0.25 * wanted.abs().mean()
    for ours, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        assert (ours.held.left == theirs.held.left).all()
        assert ours.used_bytes == theirs.used_bytes
