"""`profile`, `search` and `eval` of a model that is split over two ranks with gloo: the numbers are those of one process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from moacompress.calibration.profile.store import Profile
from moacompress.exporter.exporting import export
from moacompress.models.source import load_source
from moacompress.rules.plan import Plan
from tests import plan_kinds
from tests.cli.commands import answer, invoke
from tests.conftest import tiny_model
from tests.torchrun import torchrun

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def dense(tiny_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("split") / "dense"
    tiny_model("llama", **HEADS).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.heavy
def test_profile_and_search(dense, small_run, tmp_path):
    calibration = {**small_run["calibration"], "lengths": [300], "samples": 2}
    profile = {"draws": 1, "gates": True, "gate_samples": 2, "heads": True, "baselines": True}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"calibration": calibration, "profile": profile, "search": {"trials": 1}}))
    command = ["profile", str(dense), "--recipe", str(recipe)]
    answer(*command, "-o", tmp_path / "one")
    split = torchrun(2, *command, "-o", tmp_path / "two", "--tensor-parallel")
    assert split.returncode == 0, split.stderr[-3000:]
    one, two = (Profile.load(tmp_path / name) for name in ("one", "two"))
    assert two.shape == one.shape
    assert two.statistics.arrays.keys() == one.statistics.arrays.keys()
    for name, wanted in one.statistics.arrays.items():
        # prices of formats: where a number lies between two codes, the last bit of a sum of two ranks decides which it gets
        apart = 5e-2 if name.startswith(("key_", "value_")) else 1e-5
        found = np.abs(two.statistics.arrays[name] - wanted).max() / np.abs(wanted).max()
        assert found < apart, name
    gates = one.gate_weights.weight
    assert np.abs(two.gate_weights.weight - gates).max() < 1e-3 * np.abs(gates).max()
    options = ["--budget", "50%", "--recipe", str(recipe)]
    answer("search", tmp_path / "one", *options, "-o", tmp_path / "one.json")
    split = torchrun(2, "search", tmp_path / "two", *options, "-o", tmp_path / "two.json", "--tensor-parallel")
    assert split.returncode == 0, split.stderr[-3000:]
    plans = [Plan.load(tmp_path / name) for name in ("one.json", "two.json")]
    kept = [
        [(rule.kept(300, plan.min_window), rule.key_format, rule.value_format) for row in plan.rules for rule in row]
        for plan in plans
    ]
    assert kept[0] == kept[1]  # of two rules that keep the same tokens the last bit of a price decides
    harms = [plan.quality["measured_harm"]["plan"] for plan in plans]
    assert harms[1] == pytest.approx(harms[0], rel=1e-3)


@pytest.mark.heavy
def test_eval(dense, tmp_path):
    source = load_source(dense)
    plan = plan_kinds.formats(source.model)
    folder = export(source, plan, tmp_path / "model")
    command = f"eval {folder} --tasks needle-noise --lengths 300 --prompts 1 --against dense".split()
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    assert invoke(*command, "-o", one).exit_code == 0
    split = torchrun(2, *command, "-o", two, "--tensor-parallel")
    assert split.returncode == 0, split.stderr[-3000:]
    wanted, found = (json.loads(file.read_text())["results"] for file in (one, two))
    assert len(wanted) == len(found)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours["value"] == pytest.approx(theirs["value"], rel=1e-3, abs=1e-6)
        assert {**ours, "value": 0, "ci95": 0} == {**theirs, "value": 0, "ci95": 0}


@pytest.fixture
def two_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("moacompress.models.processes.join", lambda: None)


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--budget 25%,10% --tensor-parallel", "searches one plan for given budgets"),
        ("--storage sqlite:///study.db", "independently started workers"),
        ("--timeout 60 --tensor-parallel", "would stop at different plans"),
        ("--dry-run", "--dry-run"),
    ],
)
def test_what_is_not_searched_by_ranks(options, said):
    golden = Path(__file__).parent / "golden" / "profile"
    done = invoke("search", golden, "--budget", "50%", *options.split())
    assert done.exit_code == 2, done.output
    assert said in done.stderr


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--dry-run", "--tensor-parallel has no effect beside --dry-run"),
        (
            "--lm-eval arc_easy",
            "--tensor-parallel has no effect beside --lm-eval: lm-evaluation-harness deals its prompts",
        ),
        ("--against dense,snapkv", "snapkv has its own cache or weights"),
    ],
)
def test_what_is_not_measured_of_a_split_model(options, said, compressed):
    done = invoke("eval", compressed, "--tensor-parallel", *options.split())
    assert done.exit_code == 2
    assert said in done.stderr
