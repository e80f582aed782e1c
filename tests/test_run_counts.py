"""What is counted of a run without weights: against counted passes of tiny models, and the recipes of large models."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile import passes
from moacompress.calibration.profile.sample_statistics import sample_statistics
from moacompress.core.errors import DataError, ModelError
from moacompress.models.source import model_shape
from moacompress.models.weight_bytes import resident_bytes
from moacompress.pipeline import estimate
from moacompress.recipe import Recipe
from moacompress.rules.candidates import candidate_rules
from moacompress.rules.rule import SINKS
from moacompress.rules.rule_table import RuleTable
from moacompress.run_counts import ModelCounts, RunCounts, count_run, read_counts
from moacompress.runtime.compat.alternates import returned_cache
from tests.cli.commands import answer, invoke
from tests.conftest import tiny_model

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "tests" / "configs"
LARGE = sorted(folder.name for folder in CONFIGS.iterdir())
"""Large models of which there is a recipe: their configs, written by hand."""
LENGTH, TARGETS = 192, 7
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


class Products(TorchDispatchMode):
    """Counts the operations of products of matrices outside attention, which is an operator of its own."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in flop_registry and str(packet).rpartition(".")[2] in PRODUCTS:
            self.count += flop_registry[packet](*args, **(kwargs or {}), out_val=found)
        return found


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3", "gpt_neox", "qwen3_moe"])
def test_weights_and_cache(family: str) -> None:
    model: Any = tiny_model(family)
    counts = ModelCounts.of(model.config)
    assert counts.parameters == model.num_parameters()
    assert abs(resident_bytes(model) - 4 * counts.parameters) < 2000  # rotary frequencies
    with torch.no_grad():
        cache = returned_cache(model(input_ids=torch.full((1, LENGTH), 5), use_cache=True))
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    found = count_run(Recipe().override(calibration__lengths=(LENGTH // 2,), evaluation__lengths=(64,)), counts)
    assert found.bytes["kv_cache"] == pytest.approx(stored, rel=0.1)  # of native windows dense keeps whole blocks


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "qwen3_moe"])
def test_forward(family: str) -> None:
    model: Any = tiny_model(family, attn_implementation="eager")
    if family == "qwen3_moe":
        model.set_experts_implementation("eager")
    counts = ModelCounts.of(model.config)
    with Products() as counter, torch.no_grad():
        model(input_ids=torch.randint(3, 150, (1, LENGTH)), logits_to_keep=TARGETS, use_cache=False)
    # plain attention computes hidden scores too: all pairs where half of them, and the diagonal, count
    hidden = 2 * counts.attended(LENGTH) * (2 * LENGTH / (LENGTH + 1) - 1)
    assert counter.count == pytest.approx(counts.forward(LENGTH, TARGETS) + hidden, rel=0.01)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("draws", [1, 3])
def test_sample(draws: int, twice: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    counts = ModelCounts.of(model.config)
    if twice:
        monkeypatch.setattr(passes, "KEEP_TOKENS", LENGTH - 1)
    recipe = Recipe().override(profile__draws=draws)
    table = RuleTable.of(candidate_rules(LENGTH, SINKS, recipe.profile.min_window), 32)
    ids = np.random.default_rng(0).integers(3, 150, LENGTH)
    sample = Sample(ids, np.arange(LENGTH) >= LENGTH - TARGETS, "random", LENGTH)
    with Products() as counter:
        found = sample_statistics(model, model_shape(model), table, sample, recipe.profile, 0, 0)
    attention = (2 + draws * (5 + 2 * twice)) * counts.attended(LENGTH)
    expected = counts.sample(LENGTH, TARGETS, draws, len(recipe.profile.formats)) - attention
    expected += twice * draws * counts.rerun(LENGTH)
    assert counter.count == pytest.approx(expected, rel=0.005)
    assert sum(array.nbytes for array in found.arrays.values()) == counts.statistics_bytes(len(table), recipe)


def test_windows_of_the_model_attend_less() -> None:
    model: Any = tiny_model("gemma3_text")
    counts = ModelCounts.of(model.config)
    seen = [min(n + 1, window or LENGTH) for window in counts.shape.native_windows for n in range(LENGTH)]
    assert any(counts.shape.native_windows)
    assert counts.attended(LENGTH) == 2 * counts.shape.heads * counts.shape.head_dim * sum(seen)


def test_more_work_counts_more() -> None:
    counts = read_counts(str(CONFIGS / "qwen3-8b"))
    recipe = Recipe()
    least = count_run(recipe, counts).operations["profile"]
    for more in ({"calibration__text_samples": 4}, {"profile__gates": True}, {"profile__baselines": True}):
        assert count_run(recipe.override(**more), counts).operations["profile"] > least
    assert count_run(recipe, counts).bytes["weights"] == 2 * counts.parameters
    assert count_run(recipe.override(dtype="float32"), counts).bytes["weights"] == 4 * counts.parameters


def counted(name: str) -> RunCounts:
    recipe = Recipe.load(ROOT / "recipes" / name / "quarter.yaml")
    found = estimate(recipe.override(model=str(CONFIGS / name), calibration__text=str(ROOT / "docs" / "comparison.md")))
    assert isinstance(found, RunCounts)
    return found


@pytest.mark.parametrize(("name", "billions"), [*zip(LARGE, (8.03, 7.25, 30.5, 8.19), strict=True)])
def test_a_recipe_of_a_large_model_runs_dry(name: str, billions: float) -> None:
    counts = read_counts(str(CONFIGS / name))
    assert counts.parameters == pytest.approx(billions * 1e9, rel=0.005)
    page = (ROOT / "docs" / "scale.md").read_text("utf-8")
    found = counted(name)
    work = [f"{count / 1e15:,.3g}" for count in found.operations.values()]
    sizes = [f"{found.bytes[kind] / 1e9:,.3g}" for kind in ("weights", "kv_cache", "inputs", "peak")]
    assert f"| [{name}](../recipes/{name}/quarter.yaml) | {' | '.join([*work, *sizes])} |" in page
    assert found.bytes["peak"] < 80e9  # one GPU
    first = (ROOT / "recipes" / name / "quarter.yaml").read_text("utf-8").splitlines()[0]
    assert first.startswith("# Not run: ")


def test_the_command_says_that_it_was_counted(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(CONFIGS / "qwen3-8b", folder)
    recipe = ("--recipe", ROOT / "recipes/qwen3-8b/quarter.yaml", "--text", ROOT / "docs/comparison.md")
    asked = (folder, *recipe, "--dry-run", "-o", tmp_path / "out")
    done = invoke("compress", *asked)
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    assert re.search(r"at least \S+ x 10\^15 operations \(profile .* and nothing was timed\. Nothing was done\.", said)
    found = answer("profile", *asked)
    assert found["counted"]
    assert found["operations"] == {"profile": counted("qwen3-8b").operations["profile"]}
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_what_a_config_tells_is_refused(tmp_path: Path) -> None:
    asked = Recipe().override(model=str(CONFIGS / "qwen3-8b"), budget=["25%"])
    with pytest.raises(DataError, match="beyond the model's context of 40,960"):
        estimate(asked.override(calibration__lengths="64k"))
    with pytest.raises(DataError, match="prompts of 65,536 tokens"):
        estimate(asked.override(evaluation__lengths="64k"))
    config = json.loads((CONFIGS / "qwen3-8b" / "config.json").read_text("utf-8"))
    for change, said in (
        ({"num_key_value_heads": 5000}, "num_key_value_heads 5000"),
        ({"is_causal": False}, "both directions"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelError, match=said):
            estimate(asked.override(model=str(tmp_path)))
