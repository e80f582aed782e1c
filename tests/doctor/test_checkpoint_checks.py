"""`doctor` on compressed checkpoints: what they are, and what is damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moacompress.doctor.checks import check_model
from moacompress.models.source import model_shape
from moacompress.models.weight_bytes import checkpoint_weight_bytes
from moacompress.report.doctor_tables import model_table
from moacompress.rules.plan import Plan
from moacompress.runtime.hf.attaching import attach
from tests.conftest import tiny_model
from tests.plan_kinds import random_plan
from tests.printed import printed


@pytest.fixture
def checkpoint(compressed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compressed / "model", tmp_path / "model"))


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_compressed_checkpoint_is_described(checkpoint: Path, environment: dict[str, Any]) -> None:
    plan = Plan.load(checkpoint / "plan.json").with_notes(
        budget={"asked": ["40%"], "bytes": {"2048": {"plan": 1, "dense": 2}}}, provenance={"source": "org/dense"}
    )
    plan.save(checkpoint / "plan.json")
    edit_json(checkpoint / "config.json", lambda config: config["quantization_config"].update(plan=plan.to_dict()))
    found = check_model(str(checkpoint.parent), environment=environment)
    assert found == check_model(str(checkpoint), environment=environment)
    assert (found["problems"], found["compressed"], found["source"]) == ([], True, str(checkpoint))
    assert (found["layers"], found["kv_heads"], found["context"]) == (3, 2, 4096)
    assert found["checkpoint"] == {
        "made_from": "org/dense",
        "plan": plan.key(),
        "dtype": "float32",
        "weights_fingerprint": plan.model.weights_fingerprint,
        "budget": ["40%"],
        "kv_bytes": {"2048": {"dense": plan.model.dense_kv_bytes(2048), "plan": plan.kv_bytes(2048)}},
        "kv_share": {"2048": plan.kv_share(2048)},
        "kernel": environment["kernel"]["name"],
        "weight_files": ["model.safetensors"],
        "weight_bytes": (checkpoint / "model.safetensors").stat().st_size,
        "weight_types": {"float32": checkpoint_weight_bytes(checkpoint)["float32"]},
        "blocks_read_as_they_lie": None,
        "loads": True,
    }
    text = printed(model_table(found), width=300)
    for part in ("org/dense", "budget 40%", "KV at 2k", f"{plan.kv_share(2048):.1%}", "with from_pretrained"):
        assert part in text


def test_where_it_would_not_load_is_said(checkpoint: Path, environment: dict[str, Any]) -> None:
    switched_off = {**environment, "autoload": {"registered": False, "switch": "0", "reason": "it is off"}}
    found = check_model(str(checkpoint), environment=switched_off)
    assert (found["problems"], found["checkpoint"]["loads"]) == ([], False)
    assert "loads here no" in " ".join(printed(model_table(found), width=300).split())
    broken = {**environment, "kernel": {"name": None, "isa": None, "reason": "MOACOMPRESS_KERNEL is wrong"}}
    assert check_model(str(checkpoint), environment=broken)["checkpoint"]["kernel"] is None


def other_rule(plan: dict[str, Any]) -> None:
    plan["layers"][1]["alpha"][0] += 16


def in_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", change)


def in_plan_of_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return in_config(lambda config: change(config["quantization_config"]["plan"]))


def in_plan_file(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "plan.json", change)


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def sharded(folder: Path, index: Any) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


SHARDS = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
NORM = "model.norm.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str, bool]] = {
    "other rules in plan.json": (
        in_plan_file(other_rule),
        "plan.json is not the plan in config.json, which is the one that runs: layer 1 KV head 0: ",
        True,
    ),
    "other notes in plan.json": (
        in_plan_file(lambda plan: plan["quality"].update(kl=1.0)),
        "which is the one that runs: its quality says something else; remove plan.json to go by config.json, or export",
        True,
    ),
    "newer plan.json": (in_plan_file(lambda plan: plan.update(version=99)), "the plan has version 99", True),
    "newer plan": (in_plan_of_config(lambda plan: plan.update(version=99)), "the plan has version 99", False),
    "no plan": (in_config(lambda config: config["quantization_config"].pop("plan")), "not a moacompress plan", False),
    "another shape": (
        in_config(lambda config: config.update(num_key_value_heads=4)),
        "the plan is for another model: it is for 2 KV heads a layer, and this model has 4 KV heads a layer",
        False,
    ),
    "another family": (
        in_config(lambda config: config.update(model_type="bloom")),
        "it is for the model type llama",
        False,
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "has no weights: there is no model.safe",
        False,
    ),
    "a pickle": (pickled, "has its weights only in pytorch_model.bin, a pickle", False),
    "cut weights": (
        cut,
        "is not a whole safetensors file: Error while deserializing header: incomplete metadata",
        False,
    ),
    "a tensor lost": (
        lambda folder: edit_weights(folder, lambda weights: weights.pop(NORM)),
        f"lacks 1 of its weights, such as {NORM}; export the model again",
        False,
    ),
    "a tensor of another size": (
        lambda folder: edit_weights(folder, lambda weights: weights.update({NORM: weights[NORM][:5].clone()})),
        f"has a tensor {NORM} of shape [5], the model needs [64]",
        False,
    ),
    "a shard lost": (
        lambda folder: sharded(folder, SHARDS),
        "lacks 1 of its 2 weight files, such as model-00002-of-00002.safetensors",
        False,
    ),
    "no tokenizer": (without_tokenizer, "has no tokenizer: there is no tokenizer.json", True),
    "an index of nothing": (lambda folder: sharded(folder, []), "does not say which file holds which weight", False),
}
"""What is done to a checkpoint, what is said of it, and whether it still loads."""


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_is_said(name: str, checkpoint: Path, environment: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    damage, problem, loads = DAMAGE[name]
    damage(checkpoint)
    found = check_model(str(checkpoint), environment=environment)
    assert problem in found["problems"][0]
    assert "\n" not in found["problems"][0]
    assert found["checkpoint"]["loads"] is loads
    assert printed(model_table(found), width=300)
    json.dumps(found)
    if loads:
        assert AutoModelForCausalLM.from_pretrained(checkpoint) is not None
    else:
        with pytest.raises(Exception):  # noqa: B017, PT011  whatever transformers' own parsers raise
            AutoModelForCausalLM.from_pretrained(checkpoint)


def test_every_family_is_whole(family: str, tiny_tokenizer: Any, tmp_path: Path, environment: dict[str, Any]) -> None:
    """Tied weights are stored once, and some families store weights under other names than they have."""
    model = tiny_model(family)
    plan = random_plan(model_shape(model))
    attach(model, plan).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    plan.save(tmp_path / "plan.json")
    found = check_model(str(tmp_path), environment=environment)
    assert (found["problems"], found["checkpoint"]["loads"]) == ([], True)
    edit_weights(tmp_path, lambda weights: weights.pop(sorted(name for name in weights if "layers.1." in name)[0]))
    (problem,) = check_model(str(tmp_path), environment=environment)["problems"]
    assert "lacks 1 of its weights, such as " in problem or "numbers, the model needs" in problem


def test_weights_in_several_files(tiny_tokenizer: Any, tmp_path: Path, environment: dict[str, Any]) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    plan = random_plan(model_shape(model))
    attach(model, plan).save_pretrained(tmp_path, max_shard_size="100KB")
    tiny_tokenizer.save_pretrained(tmp_path)
    plan.save(tmp_path / "plan.json")
    found = check_model(str(tmp_path), environment=environment)
    assert found["problems"] == []
    assert len(found["checkpoint"]["weight_files"]) > 2
    assert f"in {len(found['checkpoint']['weight_files'])} files" in printed(model_table(found), width=300)
