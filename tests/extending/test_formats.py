"""A format from outside is profiled, searched, exported and loaded like our own; without its package a checkpoint says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from moacompress.core.errors import PlanError

OUTSIDE = Path(__file__).resolve().parent / "outside"
ROOT = OUTSIDE.parents[2]
LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
from moacompress.runtime.compat.alternates import returned_cache
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    read = model(input_ids=torch.full((1, 700), 5), use_cache=True)
print(json.dumps({"bytes": returned_cache(read).kv_bytes(), "finite": bool(read.logits.isfinite().all())}))
"""
EXPORT = """
from moacompress import attach
from moacompress.models.source import model_shape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
dense = AutoModelForCausalLM.from_pretrained(sys.argv[2])
plan = Plan.uniform(model_shape(dense), Rule(4, 64, 0, "fp8", "native"), 32)
attach(dense, plan).save_pretrained(sys.argv[1])
"""


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs Python where the package from outside is installed."""
    environment = os.environ | {"PYTHONPATH": f"{OUTSIDE}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    environment["MOACOMPRESS_KERNEL"] = "reference"
    done = [sys.executable, *map(str, command)]
    return subprocess.run(done, env=environment, capture_output=True, text=True, check=False)


def test_a_checkpoint_keeps_it_and_needs_its_package(tiny_folder: Path, tmp_path: Path) -> None:
    script = LOAD.replace("model = ", f"{EXPORT}model = ", 1)
    done = run("-c", script, tmp_path / "model", tiny_folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    blocks = 1 + 5  # sinks, and a window of 64 tokens, which ends within a block
    assert found == {"bytes": 3 * 2 * 16 * blocks * (16 + 4 + 16 * 4), "finite": True}
    said = " ".join(done.stderr.split())
    assert "taken, an entry point of moacompress.formats, has the name of another format and is left out" in said
    assert "no-format, an entry point of moacompress.formats, is no format" in said
    with pytest.raises(
        PlanError, match="is fp8, not one of native, int8, int6, int4; install the package that adds it"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.heavy
def test_a_whole_run_finds_it(tiny_folder: Path, small_run: dict[str, Any], tmp_path: Path) -> None:
    recipe = small_run | {"model": str(tiny_folder), "budget": "25%"}
    recipe["profile"] = {**small_run["profile"], "formats": ["fp8"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "run"
    done = run("-m", "moacompress", "compress", "--recipe", tmp_path / "recipe.yaml", "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    layers = json.loads((out / "plan.json").read_text())["layers"]
    named = {name for layer in layers for side in ("key_format", "value_format") for name in layer[side]}
    assert "fp8" in named <= {"fp8", "native"}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["kv_bytes"]["planned"] < 0.25 * summary["kv_bytes"]["dense"]
    loaded = run("-c", LOAD, out / "model")
    assert json.loads(loaded.stdout.splitlines()[-1])["finite"], loaded.stderr
