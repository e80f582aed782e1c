"""A heal of gates: they choose other tokens, the rest of the checkpoint stays, and its plan is one of the new gates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import moacompress
from moacompress.core.errors import ArtefactError
from moacompress.healer.heal_estimate import estimate_heal
from moacompress.healer.healing import heal
from moacompress.models.source import load_source
from moacompress.recipe import Recipe
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.runtime.checkpoint import load_checkpoint
from moacompress.runtime.hf.attaching import attached_plan
from tests.healer.test_healing import measured, weights

Place = dict[str, Path]
Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def gated(healable: Place, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """Returns a checkpoint of the dense model; all KV heads but the last layer's choose by gates of random weights."""
    source, rng = load_source(healable["dense"]), np.random.default_rng(5)
    layers, kv_heads = source.shape.layers, source.shape.kv_heads
    inputs = source.model.config.hidden_size
    weight = rng.standard_normal((layers, kv_heads, inputs), np.float32) / np.float32(8)
    gates = GateWeights(weight, np.zeros((layers, kv_heads), np.float32))
    choosing, window = Rule(4, 0, 0, select_alpha=8), Rule(4, 40, 0)
    rules = tuple((window if layer == layers - 1 else choosing,) * kv_heads for layer in range(layers))
    plan = Plan(source.shape, 16, rules).with_gates(gates)
    folder = tmp_path_factory.mktemp("gated") / "model"
    moacompress.attach(source.model, plan).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    plan.save(folder / "plan.json")
    return folder


def test_gates_are_healed(gated: Path, healable: Place, small: Make, tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "profile": healable["profile"],
        "teacher": str(healable["dense"]),
        "recipe": small(train="gates", lr=3e-2, steps=8, batch=1000),
    }
    estimated = estimate_heal(gated, **asked).facts
    done = heal(gated, tmp_path / "out", **asked)
    before, after = (done.notes["held_out_kl"][name]["mean"] for name in ("before", "after"))
    assert done.notes["improved"]
    assert after < 0.95 * before  # by noise in place of gradients 0.96 and 0.98, by their negatives never below
    found = measured(healable, done.folder)
    assert sum(found) / len(found) == pytest.approx(after, rel=1e-3)
    old, new = weights(gated), weights(done.folder)
    changed = {name for name, tensor in new.items() if not torch.equal(tensor, old[name])}
    assert changed == {name for name in old if name.endswith(".gate.weight")}
    plan, before_it = Plan.load(done.folder / "plan.json"), Plan.load(gated / "plan.json")
    assert plan.rules == before_it.rules
    assert plan.gate_weights is not None
    assert plan.gates == plan.gate_weights.fingerprint != before_it.gates
    assert plan.changed_weights is None  # those of the dense model are as they were
    checkpoint = load_checkpoint(done.folder, "float32", "cpu")
    assert checkpoint.plan.key() == plan.key()
    loaded = attached_plan(AutoModelForCausalLM.from_pretrained(done.folder))
    assert loaded is not None
    assert loaded.gate_weights is not None
    assert before_it.gate_weights is not None
    trained = 0
    for layer, row in enumerate(plan.rules):
        choose = any(rule.selects for rule in row)  # a layer that chooses nothing keeps its gates
        at_hand = loaded.gate_weights if choose else before_it.gate_weights
        assert np.array_equal(at_hand.weight[layer], plan.gate_weights.weight[layer])
        trained += choose * plan.gate_weights.weight[layer].size
    assert estimated["trained_parameters"] == trained
    assert estimated["train_seconds"] > 0
    assert not heal(gated, tmp_path / "out", **asked).losses  # it is there


def test_an_export_of_the_plan_is_of_the_dense_weights(
    gated: Path, healable: Place, small: Make, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moacompress.exporter.exporting.verify_fresh", lambda folder, expected, **_: None)
    asked: dict[str, Any] = {"profile": healable["profile"], "teacher": str(healable["dense"])}
    full = heal(gated, tmp_path / "full", recipe=small(train="full", steps=1, evaluations=1), **asked)
    assert full.plan.changed_weights == "healed"
    recipe = small(train="gates", lr=1e-2, steps=1, evaluations=1)
    assert heal(full.folder, tmp_path / "twice", recipe=recipe, **asked).plan.changed_weights == "healed"
    with pytest.raises(ArtefactError, match="not of this plan"):
        moacompress.export(str(healable["dense"]), full.folder / "plan.json", tmp_path / "full")
    for _ in range(2):  # made, and found again
        out = moacompress.export(str(healable["dense"]), full.folder / "plan.json", tmp_path / "out")
    plan = Plan.load(out / "plan.json")
    assert plan.changed_weights is None
    assert "heal" not in plan.provenance


@pytest.mark.parametrize("train", ["full", "lora", "gates"])
def test_in_bfloat16(train: str, gated: Path, healable: Place, small: Make, tmp_path: Path, quick: None) -> None:
    recipe = small(train=train, steps=2, evaluations=1).override(dtype="bfloat16")
    done = heal(gated, tmp_path / "out", profile=healable["profile"], teacher=str(healable["dense"]), recipe=recipe)
    assert all(np.isfinite(done.losses))
    assert done.notes["computes_in"] == "bfloat16"
