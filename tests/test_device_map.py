"""Models that a device map spreads: what is computed, found and written is what one device gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile.sample_statistics import sample_statistics, token_influence
from moacompress.calibration.profile.store import Profile
from moacompress.core.errors import ModelError
from moacompress.exporter.exporting import export
from moacompress.models.fingerprint import weights_fingerprint
from moacompress.models.placement import check_one_device, input_device, is_offloaded, layer_devices
from moacompress.models.source import load_source, model_shape
from moacompress.pipeline import compress
from moacompress.recipe import Recipe
from moacompress.recipe_sections import ProfileRecipe
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.share import Share, with_shared_rules
from moacompress.runtime import attach, detach
from moacompress.runtime.hf.attaching import attached_plan
from tests import plan_kinds
from tests.conftest import tiny_model
from tests.pretend_device import KIND

RULES = (Rule.FULL, Rule(4, 16, 0), Rule(16, 40, 0), Rule(4, 20, 0, "native", "native", 9, 0))
CHOSEN = ProfileRecipe(draws=2, anchors=2, heads=True, baselines=True)


def shared(model: Any) -> Plan:
    """The last layer attends as the first."""
    plan = plan_kinds.formats(model)
    shares = (*[None] * (plan.model.layers - 1), Share(0, (1, 0)))
    return Plan(plan.model, plan.min_window, with_shared_rules(plan.rules, shares), shares=shares)


KINDS = {"gates": plan_kinds.gates, "centres": plan_kinds.centres, "shared": shared}


def places(*devices: str) -> dict[str, str]:
    """Returns a map of a tiny model: its embedding, its layers, and what comes after them, on these devices in turn."""
    parts = ["model.embed_tokens", *(f"model.layers.{layer}" for layer in range(3)), "model.norm", "lm_head"]
    found = {part: devices[number % len(devices)] for number, part in enumerate(parts)}
    return {**found, "model.rotary_emb": devices[0] if devices[0] != "disk" else "cpu"}


@pytest.fixture(scope="module")
def map_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns the file of a map that leaves parts of a tiny model on disk, the embedding too."""
    folder = tmp_path_factory.mktemp("map")
    file = folder / "map.json"
    file.write_text(json.dumps({"device_map": places("disk", "cpu"), "offload_folder": str(folder / "offload")}))
    return str(file)


def all_statistics(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Returns everything that a profile may gather of a sample."""
    ids = np.random.default_rng(0).integers(3, 150, 70)
    sample = Sample(ids, np.arange(70) >= 60, "random", 70)
    shape, gates = model_shape(model), plan_kinds.gated_plan(model, 1).gate_weights
    found = sample_statistics(model, shape, RuleTable.of(RULES, 16), sample, CHOSEN, 0, 0, gates).arrays
    return {**found, "tokens": token_influence(model, shape, sample, 1, 0, 0)}


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, each in wanted.items():
        np.testing.assert_allclose(found[name], each, rtol=1e-5, atol=1e-5 * np.abs(each).max(), err_msg=name)


def padded_ids() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns two rows, of which the first begins with padding, and their mask."""
    ids = torch.randint(3, 150, (2, 50))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    return ids, mask


def test_statistics_from_disk(tiny_folder, map_file):
    model = load_source(tiny_folder, device=map_file).model
    assert is_offloaded(model)
    assert model.device.type == "meta"
    assert input_device(model).type == "cpu"
    same(all_statistics(model), all_statistics(load_source(tiny_folder).model))
    assert model.model.embed_tokens.weight.is_meta
    assert all(weight.is_meta for weight in model.model.layers[1].mlp.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_from_disk(kind, tiny_folder, map_file, tmp_path):
    """Loaded with plain transformers, and under a plan that was put on afterwards."""
    dense = load_source(tiny_folder).model
    plan = KINDS[kind](dense)
    model = attach(dense, plan)
    ids, mask = padded_ids()
    asked: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, **asked)
    model.save_pretrained(tmp_path / "model")
    arguments = json.loads(Path(map_file).read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **arguments)
    assert is_offloaded(loaded)
    assert torch.equal(loaded.generate(ids, **asked), wanted)
    assert attached_plan(loaded).key() == plan.key()
    loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = load_source(tiny_folder, device=map_file).model
    assert torch.equal(attach(other, plan).generate(ids, **asked), wanted)
    detach(other)
    assert weights_fingerprint(other) == weights_fingerprint(load_source(tiny_folder).model)


@pytest.fixture
def spread() -> Callable[[], PreTrainedModel]:
    """Returns a function that spreads a tiny model over two devices that are not there."""

    def make() -> PreTrainedModel:
        found = places(f"{KIND}:0", f"{KIND}:1")
        return dispatch_model(tiny_model("llama"), found, skip_keys=["past_key_values"], force_hooks=True)

    return make


@pytest.mark.heavy
def test_statistics_on_two_devices(spread, pretend_device):
    with pretend_device():
        wanted = all_statistics(tiny_model("llama").to(f"{KIND}:0"))
        model = spread()
        assert [device.index for device in layer_devices(model)] == [1, 0, 1]
        same(all_statistics(model), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_on_two_devices(kind, spread, pretend_device):
    dense = tiny_model("llama")
    plan = KINDS[kind](dense)
    ids, mask = padded_ids()
    asked: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    wanted = attach(dense, plan).generate(ids, attention_mask=mask, **asked)
    with pretend_device():
        model = attach(spread(), plan)
        there = ids.to(input_device(model)), mask.to(input_device(model))
        found = model.generate(there[0], attention_mask=there[1], **asked)
        assert torch.equal(found.cpu(), wanted)


@pytest.mark.heavy
def test_a_whole_run_from_disk(tiny_folder, small_run, map_file, tmp_path):
    """Profile, search, export, evaluation."""
    shorter = {**small_run["calibration"], "lengths": [300, 400]}
    recipe = Recipe.from_dict({**small_run, "model": str(tiny_folder), "calibration": shorter})
    torch.set_num_threads(1)
    plain, spread = (
        compress(recipe.override(device=device), tmp_path / name)
        for name, device in (("cpu", "cpu"), ("map", map_file))
    )
    ours, theirs = (Plan.load(tmp_path / name / "plan.json") for name in ("map", "cpu"))
    assert ours.rules == theirs.rules
    assert ours.model == theirs.model
    assert spread["kv_bytes"] == plain["kv_bytes"]
    assert spread["quality"].keys() == plain["quality"].keys()
    for task, wanted in plain["quality"].items():
        for name in ("dense", "plan"):
            assert spread["quality"][task][name] == pytest.approx(wanted[name], abs=1e-5)
            assert spread["quality"][task]["nll"][name] == pytest.approx(wanted["nll"][name], rel=1e-5)
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("map", "cpu"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    found, expected = (Profile.load(tmp_path / name / "profile").statistics.arrays for name in ("map", "cpu"))
    same(found, expected)


def test_what_an_export_changes_is_not_offloaded(tiny_folder, map_file, tmp_path):
    plan = shared(load_source(tiny_folder).model)
    with pytest.raises(ModelError, match="a plan whose layers share attention needs all weights in memory"):
        export(tiny_folder, plan, tmp_path / "model", device=map_file)
    assert not (tmp_path / "model").exists()


def test_a_repair_is_of_one_device(spread, pretend_device):
    with (
        pretend_device(),
        pytest.raises(ModelError, match=f"a repair needs all layers on one device.*{KIND}:0, {KIND}:1"),
    ):
        check_one_device(spread(), "a repair")
