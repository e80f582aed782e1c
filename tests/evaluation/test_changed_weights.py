"""Evaluation of checkpoints whose weights are not the dense model's any more: that is given beside them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moacompress.bench.sides import make_models
from moacompress.core.errors import PlanError, UsageError
from moacompress.evaluation.runner import evaluate
from moacompress.models.source import find_model_folder, model_shape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.share import Share
from moacompress.runtime import attach, detach
from tests.plan_kinds import with_shares


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any], tiny_tokenizer: Any, random_plan: Any
) -> dict[str, Path]:
    """A dense model, another one, and a checkpoint of the first with a layer that copies attention."""
    place = tmp_path_factory.mktemp("shared")
    made = {name: tiny_model("llama", seed=seed) for name, seed in (("dense", 0), ("other", 1))}
    for name, model in made.items():
        model.save_pretrained(place / name)
        tiny_tokenizer.save_pretrained(place / name)
    plan = with_shares(random_plan(model_shape(made["dense"]), 2), (None, None, Share(1, (1, 0))))
    attach(made["dense"], plan).save_pretrained(place / "model")
    tiny_tokenizer.save_pretrained(place / "model")
    plan.save(place / "model" / "plan.json")
    detach(made["dense"])
    return {name: place / name for name in ("dense", "other", "model")}


def run(folder: Path, **options: Any) -> dict[str, Any]:
    return evaluate(folder, **{"tasks": ("needle-noise",), "lengths": (700,), "prompts": 2, **options})


def test_shared_attention_is_measured_beside_the_dense_model(folders: dict[str, Path]) -> None:
    report = run(folders["model"], dense=folders["dense"])
    rows = {row["model"]: row for row in report["results"] if row["metric"] == "nll"}
    assert set(rows) == {"plan", "dense", "uniform"}
    shape = Plan.load(folders["model"] / "plan.json").model
    assert rows["dense"]["kv_bytes"] == shape.dense_kv_bytes(round(rows["dense"]["tokens"]))
    assert rows["plan"]["kv_bytes"] < rows["dense"]["kv_bytes"]
    assert rows["plan"]["value"] != rows["dense"]["value"]
    alone = run(folders["model"], against=())
    assert {row["value"] for row in alone["results"] if row["metric"] == "nll"} == {rows["plan"]["value"]}


def test_checkpoints_with_weights_of_their_own_are_compared(folders: dict[str, Path], tmp_path: Path) -> None:
    """One plan, on the dense model's weights and on healed ones, beside a checkpoint whose layers share attention."""
    dense = folders["dense"]
    raw = Plan.uniform(Plan.load(folders["model"] / "plan.json").model, Rule(4, 0, 200))
    names = {"raw": raw, "healed": raw.with_notes(provenance={"heal": {"tokens": 1}})}
    for name, plan in names.items():
        model = AutoModelForCausalLM.from_pretrained(dense)
        if name == "healed":
            model.model.layers[0].self_attn.o_proj.weight.data.mul_(3.0)
        shutil.copytree(dense, tmp_path / name)
        attach(model, plan).save_pretrained(tmp_path / name)
        plan.save(tmp_path / name / "plan.json")
    healed, shared = str(tmp_path / "healed"), str(folders["model"])
    report = run(tmp_path / "raw", against=("dense", healed, shared))
    found = nlls(report)
    assert len(set(found.values())) == 4  # the weights of each
    assert {row["model"] for row in report["differences"]} == {"dense", healed, shared}
    for other in (healed, shared):
        assert nlls(run(Path(other), against=(), dense=dense)) == {"plan": found[other]}
    turned = nlls(run(tmp_path / "healed", against=("dense", str(tmp_path / "raw")), dense=dense))
    assert list(turned.values()) == [found[healed], found["dense"], found["plan"]]
    # dense has the healed ones there
    with pytest.raises(PlanError, match="was made from other weights.*--dense MODEL"):
        run(tmp_path / "healed", against=("dense", str(tmp_path / "raw")))


def nlls(report: dict[str, Any]) -> dict[str, float]:
    return {row["model"]: row["value"] for row in report["results"] if row["metric"] == "nll"}


def test_another_dense_model_or_none_is_refused(folders: dict[str, Path]) -> None:
    said = "layers that share attention and no queries and keys of their own.*--dense MODEL"
    with pytest.raises(UsageError, match=said):
        run(folders["model"])
    with pytest.raises(PlanError, match="the plan is for other weights"):
        run(folders["model"], dense=folders["other"])


def test_benchmarks_have_a_dense_model_of_the_same_sizes(folders: dict[str, Path]) -> None:
    plan = Plan.load(folders["model"] / "plan.json")
    models = make_models(AutoModelForCausalLM.from_pretrained(folders["model"]), plan)
    dense = AutoModelForCausalLM.from_pretrained(folders["dense"]).num_parameters()
    assert models["dense"].num_parameters() == models["full_span"].num_parameters() == dense
    assert models["plan"].num_parameters() < dense
    assert model_shape(models["dense"]).layers == plan.model.layers


@pytest.mark.parametrize("tuned", [False, True])
def test_weights_that_the_plan_was_not_made_for_are_said(
    tuned: bool, compressed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(find_model_folder(compressed) or compressed, folder)
    if tuned:
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for dtype in ("auto", *["float16"] * tuned):  # it loses bits: nothing is known of the weights then
        caplog.clear()
        report = run(folder, against=(), prompts=1, dtype=dtype)
        said = tuned and dtype == "auto"
        assert report["checkpoint"]["other_weights"] is said
        assert ("are not those that its plan was made for" in caplog.text) is said
