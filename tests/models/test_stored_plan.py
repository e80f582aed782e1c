"""The two places of a checkpoint's plan: `config.json` is the one that runs, `plan.json` must not say anything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from moacompress.cli import app
from moacompress.core.errors import ArtefactError, PlanError
from moacompress.exporter.exporting import exported_plan
from moacompress.models.source import model_shape
from moacompress.models.stored_plan import find_plan_file, find_running_plan, read_plan, stored_plan
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.runtime import attach
from moacompress.runtime.checkpoint import load_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RUNNER = CliRunner()
SAYS = r"plan\.json is not the plan in config\.json, which is the one that runs: {}; remove plan\.json to go by config\.json"


@pytest.fixture
def folder(compressed: Path, tmp_path: Path) -> Path:
    """Returns a checkpoint of its own, as the `model` folder of a run."""
    return Path(shutil.copytree(compressed, tmp_path / "OUT")) / "model"


def test_what_is_said_twice_is_read_once(folder: Path) -> None:
    plan = Plan.load(folder / "plan.json")
    assert stored_plan(folder) == exported_plan(folder) == read_plan(folder / "plan.json") == plan
    before = RUNNER.invoke(app, ["inspect", str(folder.parent), "--json"]).stdout
    (folder / "plan.json").unlink()
    assert stored_plan(folder) == exported_plan(folder) == read_plan(folder / "plan.json") == plan
    assert RUNNER.invoke(app, ["inspect", str(folder.parent), "--json"]).stdout == before
    assert load_checkpoint(folder, "auto", "cpu").plan == plan


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plan: replace(plan, rules=plan.rules[::-1]), "layer 0 KV head 0: .* more differences"),
        (lambda plan: plan.with_notes(quality={"harm": 1.0}), "its quality says something else"),
    ],
)
def test_a_difference_is_one_error(folder: Path, change: Callable[[Plan], Plan], said: str) -> None:
    change(Plan.load(folder / "plan.json")).save(folder / "plan.json")
    reads: list[Callable[[Path], Any]] = [stored_plan, exported_plan, lambda at: load_checkpoint(at, "auto", "cpu")]
    for read in reads:
        with pytest.raises(PlanError, match=SAYS.format(said)):
            read(folder)
    for command in ("inspect", "bench", "chat"):
        done = RUNNER.invoke(app, [command, str(folder)])
        assert (done.exit_code, done.stdout) == (1, "")
        assert "is not the plan in config.json" in " ".join(done.stderr.split())


def test_a_damaged_plan_says_where(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["plan"]["version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match=r"the plan in .*config\.json: the plan has version 99"):
        stored_plan(folder)


def test_gates_are_those_of_the_weights(
    tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Which are rounded with them."""
    model: Any = tiny_model("llama")
    model.to(torch.bfloat16)
    shape, draw = model_shape(model), np.random.default_rng(0)
    numbers = draw.standard_normal((shape.layers, shape.kv_heads, 64), np.float32)
    gates = GateWeights(numbers, numbers[:, :, 0].copy())
    plan = Plan.uniform(shape, Rule(4, 20, 0, select_alpha=8), 16).with_gates(gates)
    plan.save(tmp_path / "plan.json")
    attach(model, plan).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    for loaded_in in ("auto", "float32"):
        found = load_checkpoint(tmp_path, loaded_in, "cpu").plan.gate_weights
        assert found is not None
        assert found.fingerprint == gates.fingerprint
    file = tmp_path / "plan.gates.safetensors"
    file.unlink()
    checkpoint = load_checkpoint(tmp_path, "auto", "cpu")
    own = checkpoint.plan.gate_weights
    assert own is not None
    assert np.array_equal(own.weight, torch.from_numpy(numbers).to(model.dtype).float().numpy())
    ids = torch.arange(3, 103).unsqueeze(0)
    expected = checkpoint.model(ids).logits
    checkpoint.without_plan()
    assert torch.equal(checkpoint.as_stored()(ids).logits, expected)

    numbers[1] += 1
    other = GateWeights(numbers, gates.bias)
    replaced = replace(plan.with_gates(other), model=plan.model)
    replaced.save(tmp_path / "plan.json")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["plan"] = replaced.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = r"plan\.gates\.safetensors are not those in the checkpoint's weights.*in layer 1; remove plan\.gates"
    with pytest.raises(PlanError, match=said):
        load_checkpoint(tmp_path, "auto", "cpu")


def test_a_run_with_a_checkpoint_runs_the_checkpoints_plan(folder: Path) -> None:
    run = folder.parent
    (run / "plan.json").unlink(missing_ok=True)
    model = run / "model" / "plan.json"
    assert find_plan_file(run) == find_running_plan(run) == model
    plan = Plan.load(model)
    plan.save(run / "plan.json")
    assert find_plan_file(run) == run / "plan.json"
    assert find_running_plan(run) == model
    assert find_running_plan(run / "plan.json") == run / "plan.json"
    replace(plan, rules=tuple(reversed(plan.rules))).save(run / "plan.json")
    with pytest.raises(ArtefactError, match="is another plan than that which .*model runs; name one of the two"):
        find_running_plan(run)
    shutil.rmtree(run / "model")
    assert find_running_plan(run) == run / "plan.json"
