"""Checkpoints with weights in blocks: written from a .gguf file, loaded, saved again to the bit, and refused where damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moacompress.core.errors import ArtefactError, MoaCompressError, UnsupportedError
from moacompress.doctor.checks import check_model
from moacompress.exporter.exporting import ExportRequest, estimate_export, export, save_dense
from moacompress.models.block_layers import weight_types
from moacompress.models.source import load_source
from moacompress.report.doctor_tables import model_table
from moacompress.report.inspection import inspect_plan, overview
from moacompress.rules.plan import Plan
from moacompress.runtime import detach
from moacompress.runtime.checkpoint import load_checkpoint, with_dense
from tests.plan_kinds import random_plan
from tests.printed import printed
from tests.weight_blocks import types_of, write_gguf

pytest.importorskip("gguf")

TOKENS = torch.arange(80)[None] * 11 % 320
TYPES = types_of("Q4_1", token_embd="Q8_0", attn_v="Q5_0", ffn_down="Q6_K")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", TYPES)


@pytest.fixture(scope="module")
def plan(file: Path) -> Plan:
    return random_plan(load_source(file).shape, 3)


@pytest.fixture(scope="module")
def exported(file: Path, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(file, plan, tmp_path_factory.mktemp("out") / "model")


def logits(model) -> torch.Tensor:
    with torch.no_grad():  # other kernels compute where there are gradients
        return model(TOKENS).logits


def edit_weights(folder: Path, **changed) -> None:
    weights = load_file(folder / "model.safetensors")
    for name, tensor in changed.items():
        weights[name.replace("__", ".")] = tensor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edit_types(folder: Path, **changed) -> None:
    config = json.loads((folder / "config.json").read_text())
    types = config["quantization_config"]["weights"]
    types |= {name.replace("__", "."): kind for name, kind in changed.items()}
    config["quantization_config"]["weights"] = {name: kind for name, kind in types.items() if kind is not None}
    (folder / "config.json").write_text(json.dumps(config))


def test_it_computes_what_the_file_does(exported: Path, file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert model.dtype == torch.bfloat16
    assert set(weight_types(model).values()) == set(TYPES.values())
    source = load_source(file).model
    weights, expected = model.state_dict(), source.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(detach(model)), logits(source))
    stored = load_file(exported / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    assert "lm_head.weight" not in stored


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_other_families(architecture: str, tmp_path: Path) -> None:
    source = load_source(write_gguf(tmp_path / "tiny.gguf", TYPES, architecture=architecture, head="Q6_K"))
    folder = export(source, random_plan(source.shape, 5), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert weight_types(model) == weight_types(source.model)
    assert torch.equal(logits(detach(model)), logits(source.model))


def test_saving_it_again_changes_no_bit(exported: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(exported).save_pretrained(tmp_path)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (exported / name).read_bytes()


def test_a_dtype_is_what_is_computed_in(exported: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported, dtype="float16")
    assert model(TOKENS).logits.dtype == model.model.embed_tokens(TOKENS).dtype == torch.float16
    assert model.lm_head.weight.dtype == torch.uint8


def test_an_export_is_reused_with_its_types_alone(exported: Path, file: Path, plan: Plan, tmp_path: Path) -> None:
    assert export(file, plan, exported) == exported
    with pytest.raises(ArtefactError, match="has weights of other types"):
        export(file, plan, exported, weights="dense")
    dense = export(file, plan, tmp_path / "dense", weights="dense")
    model = AutoModelForCausalLM.from_pretrained(dense)
    assert not weight_types(model)
    assert "weights" not in json.loads((dense / "config.json").read_text())["quantization_config"]
    asked = [ExportRequest(file, plan, tmp_path / "new", weights=each) for each in ("keep", "dense")]
    assert estimate_export(asked[0]).line() != estimate_export(asked[1]).line()


def test_a_checkpoint_is_put_under_other_plans(exported: Path, file: Path, plan: Plan, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(exported, "auto", "cpu")
    other = random_plan(plan.model, 8)
    checkpoint.put_on(other).save_pretrained(tmp_path / "other")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    assert weight_types(loaded) == weight_types(load_source(file).model)
    assert with_dense(checkpoint, file).dense_weights == checkpoint.weights
    assert checkpoint.weights == plan.model.weights_fingerprint


def test_types_and_bytes_are_said(exported: Path, file: Path, plan: Plan, environment, tmp_path: Path) -> None:
    sizes = {"Q8_0": 320 * 272, "Q4_1": 2 * (2 * 256 + 128 + 2 * 512) * 160, "Q5_0": 2 * 128 * 176}
    sizes |= {"Q6_K": 2 * 256 * 420, "bfloat16": 5 * 512}
    card = (exported / "README.md").read_text()
    found = check_model(str(exported), environment=environment)
    assert found["problems"] == []
    assert found["checkpoint"]["weight_types"] == sizes
    inspected = inspect_plan(plan, None, exported)
    assert inspected["weights"] == sizes
    dense = save_dense(file, tmp_path / "dense")
    assert load_source(dense).shape == plan.model
    numbers = load_file(dense / "model.safetensors").values()
    assert inspected["parameters"]["plan"] == sum(tensor.numel() for tensor in numbers)
    for kind, size in sizes.items():
        assert f"| {kind} | {size:,} |" in card
        assert kind in printed(overview(plan, inspected), width=300)
        assert kind in printed(model_table(found), width=300)
    assert "slow" in printed(model_table(found), width=300)


Q = "model__layers__0__self_attn__q_proj"
Q_WEIGHT = f"{Q}__weight"


@pytest.mark.parametrize(
    ("edit", "changed", "message"),
    [
        (edit_types, {"model__layers__9__mlp": "Q8_0"}, "is not known"),
        (edit_types, {"lm_head": "Q2_X"}, "'Q2_X' is not known"),
        (edit_types, {"lm_head": 8}, "as text"),
        (edit_types, {Q: None}, "q_proj.weight of shape"),
        (edit_types, {Q: "Q4_0"}, "q_proj.weight of shape"),
        (edit_weights, {Q_WEIGHT: torch.zeros(256, 159, dtype=torch.uint8)}, "q_proj.weight of shape"),
        (edit_weights, {Q_WEIGHT: torch.zeros(256, 160)}, "as F32, the model needs blocks, U8"),
        (edit_weights, {"model__norm__weight": torch.zeros(256, dtype=torch.uint8)}, "as U8, the model needs numbers"),
    ],
)
def test_what_does_not_fit_is_refused(edit, changed, message: str, copied: Path, environment) -> None:
    edit(copied, **changed)
    with pytest.raises((MoaCompressError, ValueError), match=message):
        AutoModelForCausalLM.from_pretrained(copied)
    found = check_model(str(copied), environment=environment)
    assert any(message in problem or "holds U8 tensors" in problem for problem in found["problems"])
    assert not found["checkpoint"]["loads"]


def test_vllm_refuses_it_in_one_sentence(exported: Path) -> None:
    pytest.importorskip("vllm")
    from moacompress.serving.vllm.config import PlanConfig

    with pytest.raises(UnsupportedError, match="its weights are in blocks of codes; export it with `--weights dense`"):
        PlanConfig.from_config(json.loads((exported / "config.json").read_text())["quantization_config"])


@pytest.mark.heavy
@pytest.mark.real
@pytest.mark.fresh_process
def test_smollm2_is_as_small_as_its_file(tmp_path: Path) -> None:
    from tests.conftest import ROOT

    file = next(iter(sorted((ROOT / ".cache").glob("**/SmolLM2-135M-Instruct*.gguf"))))
    plan = Plan.load(ROOT / "docs" / "plans" / "smollm2-135m-eighth.json").in_dtype("bfloat16")
    folder = export(file, plan, tmp_path / "model")
    assert (folder / "model.safetensors").stat().st_size < 100e6
