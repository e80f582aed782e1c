"""A loaded model compressed where it is: what it then runs under, and what is left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import moacompress
from moacompress.core.errors import ArtefactError, DataError, MoaCompressError, ModelError, UsageError
from moacompress.efforts import effort_recipe
from moacompress.recipe import Recipe
from moacompress.rules.plan import Plan
from moacompress.runtime.hf.attaching import attached_plan
from moacompress.runtime.hf.prefixes import keep_prefixes, kept_limit
from tests.conftest import tiny_model
from tests.plan_kinds import gates


@pytest.fixture
def loaded(tiny_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_folder)


@pytest.fixture
def recipe(small_run: dict[str, Any]) -> Recipe:
    return Recipe.from_dict(small_run)


def test_a_loaded_model_gets_a_plan(loaded: Any, recipe: Recipe, tmp_path: Path) -> None:
    loaded.train()
    frozen = next(loaded.parameters()).requires_grad_(False)
    weights = {name: value.clone() for name, value in loaded.state_dict().items()}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):  # as a program may have them on for all it does
        found = moacompress.compress_(loaded, budget="40%", recipe=recipe)
    plan = attached_plan(loaded)
    assert plan is not None
    assert plan.key() == found.plan.key()
    assert found.plan.kv_share(800) <= 0.4
    assert found.path is None
    assert loaded.training
    assert all(parameter.requires_grad != (parameter is frozen) for parameter in loaded.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(UsageError, match="under a plan already; take it off first"):
        moacompress.compress_(loaded, budget="40%", recipe=recipe)
    loaded.save_pretrained(tmp_path / "saved")
    assert moacompress.inspect(tmp_path / "saved", [800])["kv_bytes"]["800"]["plan"] == found.plan.kv_bytes(800)


def test_rows_in_memory_are_what_it_is_calibrated_on(loaded: Any, recipe: Recipe, tmp_path: Path) -> None:
    rows = [f"{'words ' * (35 if n % 2 else 20)} number {n} is" for n in range(40)]  # a token a letter
    work = tmp_path / "work"
    options: dict[str, Any] = {"lengths": "200,300", "recipe": recipe, "work": work}
    found = moacompress.compress_(loaded, "50%", rows, **options)
    assert found.path == work / "plan.json"
    assert [part["path"] for part in found.plan.provenance["recipe"]["calibration"]["sources"]] == [
        path.name for path in work.glob("rows-*.jsonl")
    ]
    moacompress.detach(loaded)
    again = moacompress.compress_(loaded, "50%", rows, **{**options, "work": os.path.relpath(work)})
    assert again.plan == found.plan
    assert again.trials == found.trials
    moacompress.detach(loaded)
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    with pytest.raises(ArtefactError, match="another"):
        moacompress.compress_(loaded, "50%", rows[::-1], **options)
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(DataError, match="row 1 of data cannot be written as JSON"):
        moacompress.compress_(loaded, "50%", ["a", {"prompt": {1, 2}}], **options)


def test_rows_in_a_file_are_what_it_is_calibrated_on(loaded: Any, recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    with pytest.raises(DataError, match=r"mine\.jsonl"):
        moacompress.compress_(loaded, "50%", file, lengths=200, recipe=recipe)
    file.write_text("".join(json.dumps({"prompt": f"{'words ' * 20} number {n} is"}) + "\n" for n in range(40)))
    found = moacompress.compress_(loaded, "50%", str(file), lengths=200, recipe=recipe)
    noted = found.plan.provenance["recipe"]["calibration"]
    assert [part["path"] for part in noted["sources"]] == ["mine.jsonl"]
    assert found.plan.profiled_lengths == [200]


def test_what_fails_leaves_the_model_as_it_was(loaded: Any, recipe: Recipe) -> None:
    loaded.train()
    with pytest.raises(MoaCompressError):
        moacompress.compress_(loaded, budget="0.01%", recipe=recipe)
    assert loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert attached_plan(loaded) is None
    for options, message in (
        ({}, "no budget given"),
        ({"budget": "40%", "recipe": recipe, "effort": "quick"}, "give one of them"),
        ({"budget": "40%", "max_loss": "1%"}, "give one of them"),
    ):
        with pytest.raises(MoaCompressError, match=message):
            moacompress.compress_(loaded, **options)
    loaded.config.name_or_path = loaded.name_or_path = ""
    with pytest.raises(UsageError, match="give its tokenizer as tokenizer="):
        moacompress.compress_(loaded, budget="40%", recipe=recipe)


def test_a_plan_for_a_while(loaded: Any, compressed: Path) -> None:
    ids = torch.arange(300)[None] % loaded.config.vocab_size
    plan = Plan.load(compressed / "model" / "plan.json")
    with torch.no_grad():
        dense = loaded(ids).logits
        with moacompress.applied(loaded, plan) as model:
            assert model is loaded
            under = loaded(ids).logits
        assert torch.equal(loaded(ids).logits, dense)
        assert not torch.allclose(under, dense)
        moacompress.attach(loaded, Plan.full(plan.model))
        with pytest.raises(ValueError, match="from within"), moacompress.applied(loaded, plan):
            raise ValueError("from within")
    earlier = attached_plan(loaded)
    assert earlier is not None
    assert earlier.key() == Plan.full(plan.model).key()
    keep_prefixes(loaded, "1MiB")
    with moacompress.applied(loaded, plan):
        assert kept_limit(loaded) is None
    assert kept_limit(loaded) == 1 << 20


def test_what_is_around_a_model_is_refused(loaded: Any, compressed: Path, recipe: Recipe) -> None:
    """A plan would be on what is around, and what it changes on the model inside, which could not be had back."""
    from peft import LoraConfig, get_peft_model

    plan = Plan.load(compressed / "model" / "plan.json")
    ids = torch.arange(300)[None] % loaded.config.vocab_size
    with torch.no_grad():
        dense = loaded(ids).logits
    adapted: Any = get_peft_model(loaded, LoraConfig(target_modules=["q_proj"]))
    compiled: Any = torch.compile(loaded)
    layer: Any = torch.nn.Linear(2, 2)
    for around, inside in ((compiled, "_orig_mod"), (adapted, r"get_base_model\(\)")):
        with pytest.raises(ModelError, match=rf"is around a model; give the one inside \(`model\.{inside}`\)"):
            moacompress.attach(around, plan)
        with pytest.raises(ModelError, match="is around a model"):
            moacompress.compress_(around, budget="40%", recipe=recipe)
    with pytest.raises(ModelError, match="a Linear is not a causal LM"):
        moacompress.attach(layer, plan)
    moacompress.attach(adapted.get_base_model(), plan)
    with torch.no_grad():
        assert not torch.allclose(adapted(ids).logits, dense)
        moacompress.detach(adapted.get_base_model())
        assert torch.equal(adapted(ids).logits, dense)


def test_inspect_takes_whatever_holds_a_plan(compressed: Path) -> None:
    file = compressed / "model" / "plan.json"
    plan = Plan.load(file)
    assert moacompress.inspect(plan)["kv_bytes"] == moacompress.inspect(file)["kv_bytes"]
    assert moacompress.inspect(compressed)["parameters"]["plan"] > 0
    with pytest.raises(MoaCompressError, match="does not exist"):
        moacompress.inspect("nowhere")
    wrong: Any
    for wrong in ([0], [-5], ["4k"], [True]):
        with pytest.raises(UsageError, match="lengths are numbers of tokens above 0"):
            moacompress.inspect(plan, wrong)
    with pytest.raises(UsageError, match="no effort is called 'fast'; there are quick, standard, thorough"):
        effort_recipe("fast", prose=False)  # type: ignore[arg-type]


def test_parameters_of_gates_are_counted_once(tmp_path: Path) -> None:
    """They are in the checkpoint's weights, and in a file beside the plan."""
    model = tiny_model("llama")
    dense = sum(parameter.numel() for parameter in model.parameters())
    plan = gates(model)
    moacompress.attach(model, plan).save_pretrained(tmp_path)
    plan.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.gates.safetensors").is_file()
    found = moacompress.inspect(tmp_path)["parameters"]
    assert found["dense"] == dense
    assert dense < found["plan"] == sum(parameter.numel() for parameter in model.parameters())


def test_plans_are_said_in_a_line(compressed: Path) -> None:
    text = str(Plan.load(compressed / "model" / "plan.json"))
    assert text.startswith("plan for llama, ")
    assert "of the KV bytes at 4,096 tokens" in text
