"""A heal of weights in blocks: what was trained is stored as numbers, the rest keeps its bytes, and both are counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moacompress.calibration.data.samples import load_samples
from moacompress.cli import app
from moacompress.core.errors import UsageError
from moacompress.doctor.checks import check_model
from moacompress.healer.heal_estimate import estimate_heal
from moacompress.healer.healing import heal
from moacompress.healer.teacher import HeldOut, Teacher
from moacompress.healer.trained_weights import as_written, make_trainable, put_written, written_tensors
from moacompress.models.block_layers import BlockLinear, dense_weight, weight_types
from moacompress.models.source import load_source
from moacompress.models.weight_bytes import checkpoint_weight_bytes
from moacompress.recipe import Recipe
from moacompress.rules.plan import Plan
from tests.healer.conftest import make_healable, make_sharing
from tests.weight_blocks import types_of, write_gguf

Place = dict[str, Path]
Make = Callable[..., Recipe]
NORM = "post_attention_layernorm.weight"
"""What is off in the models here: blocks are constants."""
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def in_blocks(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_tokenizer: Any, random_plan: Callable[..., Any]
) -> Place:
    """Returns what `healable` does, of a model of which the linear layers are rounded to four bits."""
    return make_healable(tmp_path_factory.mktemp("in_blocks"), tiny_folder, tiny_tokenizer, random_plan, "int4", NORM)


def put_to_the_test(folder: Path, start: Path, trained: set[str], tmp_path: Path) -> Any:
    """Loads a healed checkpoint: trained layers are plain, all others have the bytes that they had; it is saved again alike."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    start_model: Any = AutoModelForCausalLM.from_pretrained(start)
    before = load_file(start / "model.safetensors")
    types = json.loads((start / "config.json").read_text())["quantization_config"]["weights"]
    assert weight_types(model) == {name: kind for name, kind in types.items() if name.rpartition(".")[2] not in trained}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        if name.rpartition(".")[2] in trained:
            assert module.weight.dtype == model.dtype
            assert not isinstance(module, BlockLinear)
            old: Any = start_model.get_submodule(name)
            assert not torch.equal(module.weight, dense_weight(old))
        else:
            assert torch.equal(module.weight, before[f"{name}.weight"])
    model.save_pretrained(tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()
    assert check_model(str(folder))["problems"] == []
    return model


@pytest.mark.parametrize("modules", [pytest.param(None, marks=pytest.mark.heavy), "o_proj, down_proj"])
def test_adapters_are_merged_into_the_layers_that_they_are_of(
    modules: str | None, in_blocks: Place, small: Make, tmp_path: Path, quick: None
) -> None:
    recipe = small(train="lora", lr=2e-2, rank=8, steps=8, batch=1000, modules=modules)
    done = heal(in_blocks["model"], tmp_path / "out", profile=in_blocks["profile"], recipe=recipe)
    notes = done.notes
    before, after = (notes["held_out_kl"][name]["mean"] for name in ("before", "after"))
    assert notes["improved"]
    assert after < 0.95 * before
    model = put_to_the_test(done.folder, in_blocks["model"], set(recipe.heal.modules or LINEAR), tmp_path)
    samples = load_samples(in_blocks["profile"] / "validation.safetensors")[:6]
    held_out = HeldOut(Teacher(load_source(in_blocks["dense"], weights="int4").model), samples)
    for measured, expected in ((AutoModelForCausalLM.from_pretrained(in_blocks["model"]), before), (model, after)):
        kls = held_out.kls(measured)
        assert sum(kls) / len(kls) == pytest.approx(expected, rel=1e-3)
    sizes = notes["weight_bytes"]
    stored = [checkpoint_weight_bytes(folder) for folder in (in_blocks["model"], done.folder)]
    assert [sizes["before"], sizes["after"]] == stored
    assert sum(sizes["after"].values()) > sum(sizes["before"].values())
    card = (done.folder / "README.md").read_text()
    assert f"The weights take {sum(sizes['after'].values()):,} bytes, before {sum(sizes['before'].values()):,}" in card
    with torch.no_grad():
        ids = torch.arange(4, 60)[None]
        together = model(ids, use_cache=False).logits[0, -1]
        steps = model.generate(ids, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert (steps.logits[0][0] - together).abs().max() < 1e-3


@pytest.mark.heavy
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_the_types_of_a_gguf_file(
    compute: str, small: Make, tmp_path: Path, quick: None, tiny_tokenizer: Any, random_plan: Callable[..., Any]
) -> None:
    """Blocks of 256 numbers, several types, and what is computed in is not what is stored in."""
    pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "tiny.gguf", types_of("Q4_K", token_embd="Q8_0", attn_v="Q5_K", ffn_down="Q6_K"))
    place = make_healable(tmp_path, file, tiny_tokenizer, random_plan, off=NORM)
    recipe = small(train="lora", lr=5e-3, steps=6, modules="v_proj,down_proj").override(dtype=compute)
    done = heal(place["model"], tmp_path / "out", profile=place["profile"], recipe=recipe)
    assert done.notes["improved"]
    assert done.notes["computes_in"] == compute
    model = put_to_the_test(done.folder, place["model"], {"v_proj", "down_proj"}, tmp_path)
    assert model.dtype == torch.bfloat16
    assert set(weight_types(model).values()) == {"Q4_K", "Q8_0"}
    assert done.notes["weight_bytes"]["after"] == checkpoint_weight_bytes(done.folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_measured_as_it_is_written(dtype: str, in_blocks: Place, small: Make) -> None:
    """Afterwards the model is as it was; what is written is the sum of blocks and adapters in the checkpoint's dtype."""
    computed = getattr(torch, dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(in_blocks["model"], dtype=computed).requires_grad_(False)
    numbers = {name: dense_weight(module) for name, module in model.named_modules() if isinstance(module, BlockLinear)}
    plan = Plan.load(in_blocks["model"] / "plan.json")
    made = make_trainable(model, plan, small(train="lora", modules="v_proj").heal, 0)
    torch.manual_seed(1)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    ids = torch.arange(4, 90)[None]
    before = {name: value.clone() for name, value in made.state_dict().items()}
    with torch.no_grad():
        with as_written(made, torch.bfloat16) as written:
            found = written(input_ids=ids, use_cache=False).logits
        tensors = written_tensors(made, torch.bfloat16)
        fresh: Any = AutoModelForCausalLM.from_pretrained(in_blocks["model"], dtype=computed)
        put_written(fresh, {name: tensor.to(fresh.dtype) for name, tensor in tensors.items()})
        assert torch.equal(found, fresh(ids, use_cache=False).logits)
    for name, tensor in tensors.items():
        layer = made.get_base_model().get_submodule(name.removesuffix(".weight"))
        expected = numbers[name.removesuffix(".weight")] + layer.get_delta_weight("default")
        assert torch.equal(tensor, expected.to(torch.bfloat16))
    assert len(tensors) == plan.model.layers
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_layers_that_share_attention_are_trained_as_numbers(
    in_blocks: Place, small: Make, tmp_path: Path, quick: None, tiny_tokenizer: Any
) -> None:
    make_sharing(load_source(in_blocks["dense"], weights="int4"), tiny_tokenizer, tmp_path / "shared")
    recipe = small(steps=8, batch=1000, train="reuse", lr=3e-3)
    done = heal(tmp_path / "shared", tmp_path / "out", profile=in_blocks["profile"], recipe=recipe)
    assert done.notes["improved"]
    model: Any = AutoModelForCausalLM.from_pretrained(done.folder)
    plain = {name for name, module in model.named_modules() if type(module) is nn.Linear and "layers" in name}
    layer = "model.layers.1"
    attention = {f"{layer}.self_attn.{name}" for name in ("v_proj", "o_proj")}
    assert {name for name in weight_types(model) if name.startswith(layer)} == {
        f"{layer}.self_attn.{name}" for name in ("q_proj", "k_proj")
    }  # those have no rows
    assert {*attention, *(f"{layer}.mlp.{name}" for name in LINEAR[4:])} <= {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear)
    } - weight_types(model).keys()
    assert not any(name.startswith("model.layers.0") for name in plain)
    assert done.notes["weight_bytes"]["after"] == checkpoint_weight_bytes(done.folder)


def test_where_nothing_was_better_all_bytes_are_kept(
    in_blocks: Place, small: Make, tmp_path: Path, quick: None
) -> None:
    recipe = small(train="lora", lr=0.9, steps=2)
    done = heal(in_blocks["model"], tmp_path / "out", profile=in_blocks["profile"], recipe=recipe)
    assert not done.notes["improved"]
    before, after = (load_file(place / "model.safetensors") for place in (in_blocks["model"], done.folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert done.notes["weight_bytes"]["after"] == checkpoint_weight_bytes(in_blocks["model"])
    assert "bytes, as before" in (done.folder / "README.md").read_text()


def test_the_command_says_what_the_weights_take(in_blocks: Place, tmp_path: Path) -> None:
    place = [str(in_blocks["model"]), "-o", str(tmp_path / "out"), "--profile", str(in_blocks["profile"])]
    text = "--modules down_proj --steps 4 --batch 576 --samples 12 --lr 0.02 --set heal.rank=8"
    options = text.split()
    expected = estimate_heal(
        in_blocks["model"],
        profile=in_blocks["profile"],
        recipe=Recipe.from_dict({"heal": {"modules": ["down_proj"], "samples": 12, "steps": 4, "batch": 576}}),
    )
    done = CliRunner().invoke(app, ["heal", *place, *options, "--json"])
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["improved"]
    assert data["weight_bytes"] == expected.facts["weight_bytes"]
    assert data["weight_bytes"]["after"] == checkpoint_weight_bytes(tmp_path / "out")
    assert any("trained layers are stored as numbers" in line for line in expected.lines())
    shown = CliRunner().invoke(app, ["heal", *place, *options]).stdout
    assert "lora of down_proj" in shown
    assert "after" in next(line for line in shown.splitlines() if line.startswith("weights"))
    inspected = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "out"), "--json"]).stdout)
    assert inspected["weights"] == data["weight_bytes"]["after"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"train": "full"},
            "in blocks of codes, and a heal of all of them would leave none; export the plan with --weights",
        ),
        ({"train": "reuse", "modules": "o_proj"}, "--modules names the layers that LoRA is trained in"),
        ({"train": "lora", "modules": "o_prj"}, "no linear layers called 'o_prj' to train; it has down_proj"),
        ({"train": "lora", "modules": "lm_head"}, "no linear layers called 'lm_head'"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    flags: dict[str, Any], message: str, in_blocks: Place, small: Make, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        heal(in_blocks["model"], tmp_path / "out", profile=in_blocks["profile"], recipe=small(**flags))
    assert list(tmp_path.iterdir()) == []
