"""Plans of other projects by the command line: in, exported and out again; and what is wrong is said."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import moacompress
from moacompress.cli.convert import write_pattern
from moacompress.core import files
from moacompress.core.errors import PlanError
from moacompress.rules.foreign_plans import DuoPattern
from moacompress.rules.plan import Plan
from tests.cli import commands

invoke = partial(commands.invoke, "convert")


def said(done: Any) -> str:
    return " ".join(done.output.split())


@pytest.fixture
def shape(compressed: Path) -> Any:
    return Plan.load(compressed / "model" / "plan.json").model


def test_a_pattern_comes_in_and_goes_out(tiny_folder: Path, shape: Any, tmp_path: Path) -> None:
    pattern, plan = tmp_path / "pattern", tmp_path / "plan.json"
    pattern.mkdir()
    (pattern / "config.json").write_text(json.dumps({"sink_size": 128, "recent_size": 256, "lr": 0.02}))
    rows = [
        ["1.0" if (layer + head) % 2 else "-1e-4" for head in range(shape.kv_heads)] for layer in range(shape.layers)
    ]
    (pattern / "full_attention_heads.tsv").write_text("\n".join(map("\t".join, rows)) + "\n")
    done = invoke(pattern, "--from", "duo-attention", "--model", tiny_folder, "-o", plan)
    assert done.exit_code == 0, done.output
    assert "Not as it was: its sink of 128 tokens is one of 64 here." in said(done)
    assert Plan.load(plan).model == shape
    assert invoke(plan, "--to", "duo-attention", "-o", tmp_path / "again").exit_code == 0
    again = (tmp_path / "again" / "full_attention_heads.tsv").read_text().splitlines()
    assert [[float(value) > 0.5 for value in line.split("\t")] for line in again] == [
        [value == "1.0" for value in row] for row in rows
    ]
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == {"sink_size": 64, "recent_size": 256}
    assert "exists already" in said(invoke(plan, "--to", "duo-attention", "-o", tmp_path / "again"))


def test_a_pattern_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be written leaves an earlier pattern's two files as they were, and others in the folder are left alone."""
    (tmp_path / "state.safetensors").write_text("")
    write_pattern(tmp_path, DuoPattern([[1.0]], 64, 256))
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(before) == {"state.safetensors", "full_attention_heads.tsv", "config.json"}
    write = files._write_aside

    def stopped(path: Path, data: bytes) -> Path:
        if path.name == "config.json":
            raise KeyboardInterrupt
        return write(path, data)

    monkeypatch.setattr(files, "_write_aside", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_pattern(tmp_path, DuoPattern([[0.0]], 16, 64))
    assert {name: (tmp_path / name).read_text() for name in before} == before


def test_spans_go_out_and_come_in(compressed: Path, tiny_folder: Path, shape: Any, tmp_path: Path) -> None:
    file, plan = tmp_path / "moa.json", tmp_path / "plan.json"
    found = json.loads(invoke(compressed, "--to", "moa", "-o", file, "--json").stdout)
    assert found["written"] == str(file)
    assert found["lost"]
    held = json.loads(file.read_text())
    assert len(held["alphas"]) == len(held["betas"]) == shape.layers
    assert len(held["alphas"][0]) == shape.heads
    done = invoke(file, "--from", "moa", "--model", tiny_folder, "--at", "1k", "-o", plan)
    assert done.exit_code == 0, done.output
    assert {rule.sink for row in Plan.load(plan).rules for rule in row if not rule.is_full} <= {64}


@pytest.mark.parametrize("form", ["modelopt", "llm-compressor"])
def test_a_quantized_cache_comes_in_and_goes_out(form: str, tiny_folder: Path, shape: Any, tmp_path: Path) -> None:
    folder, plan, out = tmp_path / "checkpoint", tmp_path / "plan.json", tmp_path / "out.json"
    folder.mkdir()
    if form == "modelopt":
        held: dict[str, Any] = {"kv_cache_quantized_layers": {"model.layers.1.self_attn": {"quant_algo": "NVFP4"}}}
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": held}))
        wanted = [("native", "native"), ("int4", "int4"), *[("native", "native")] * (shape.layers - 2)]
    else:
        held = {"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"}}
        (folder / "config.json").write_text(json.dumps({"quantization_config": held}))
        wanted = [("int8", "int8")] * shape.layers
    done = invoke(folder, "--from", form, "--model", tiny_folder, "-o", plan)
    assert done.exit_code == 0, done.output
    assert "Not as it was: " in said(done)
    rules = Plan.load(plan).rules
    assert all(rule.sees_all for row in rules for rule in row)
    assert [{(rule.key_format, rule.value_format) for rule in row} for row in rules] == [{each} for each in wanted]
    assert "Lost: " in said(invoke(plan, "--to", form, "-o", out))
    again = tmp_path / "again.json"
    assert invoke(out, "--from", form, "--model", tiny_folder, "-o", again).exit_code == 0
    assert Plan.load(again).rules == rules
    (folder / "config.json").write_text("[]")
    (folder / "hf_quant_config.json").write_text("[]")
    assert f"cannot be read as a config of {form}: it must hold an object" in said(
        invoke(folder, "--from", form, "--model", tiny_folder, "-o", again, "--overwrite")
    )


def test_a_config_alone_is_model_enough(tiny_folder: Path, shape: Any, tmp_path: Path) -> None:
    described, plan = tmp_path / "described", tmp_path / "plan.json"
    described.mkdir()
    shutil.copyfile(tiny_folder / "config.json", described / "config.json")
    pattern = tmp_path / "pattern"
    heads = [[float((layer + head) % 2) for head in range(shape.kv_heads)] for layer in range(shape.layers)]
    write_pattern(pattern, DuoPattern(heads, 64, 256))
    done = invoke(pattern, "--from", "duo-attention", "--model", described, "-o", plan)
    assert done.exit_code == 0, done.output
    assert "any weights of this shape. Next: moacompress export MODEL" in said(done)
    made = Plan.load(plan)
    assert made.model == replace(shape, weights_fingerprint="")
    folder = moacompress.export(tiny_folder, made, tmp_path / "model")
    assert Plan.load(folder / "plan.json").rules == made.rules
    assert moacompress.export(tiny_folder, plan, folder) == folder  # it is this plan's
    other = {**made.to_dict()["model"], "weights_fingerprint": "2-0123456789abcdef"}
    with pytest.raises(PlanError, match="the plan is for other weights"):
        moacompress.export(tiny_folder, Plan.from_dict({**made.to_dict(), "model": other}), tmp_path / "other")


def test_what_is_read_is_never_replaced(compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tmp_path / "plan.json"
    shutil.copyfile(compressed / "model" / "plan.json", plan)
    before = plan.read_bytes()
    monkeypatch.chdir(tmp_path)
    for arguments, match in (
        ((plan, "--to", "moa", "--overwrite"), "give --out PATH for the moa plan"),
        ((plan, "--to", "moa", "--overwrite", "-o", tmp_path / "." / "plan.json"), "plan.json is the input"),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 2
        assert match in said(done)
    (tmp_path / "run").mkdir()
    shutil.copyfile(plan, tmp_path / "run" / "plan.json")
    (tmp_path / "run" / "config.json").write_text("{}")
    done = invoke("run", "--to", "moa", "--overwrite", "-o", "run/plan.json")
    assert "plan.json is the input" in said(done)
    assert (tmp_path / "run" / "plan.json").read_bytes() == before
    done = invoke("run", "--from", "modelopt", "--model", "run", "--overwrite", "-o", "run/config.json")
    assert "config.json is the input" in said(done)
    (tmp_path / "file").write_text("")
    done = invoke(plan, "--to", "duo-attention", "-o", tmp_path / "file", "--overwrite")
    assert done.exit_code == 1
    assert f"cannot write {tmp_path / 'file'}" in said(done)
    assert plan.read_bytes() == before
    for config in ("{}", "[", '{"model_type": "llama"}'):  # a model's folder, compressed or not
        (tmp_path / "run" / "config.json").write_text(config)
        done = invoke(plan, "--to", "duo-attention", "-o", tmp_path / "run", "--overwrite")
        assert done.exit_code == 1
        assert "config.json exists already and is no pattern's" in said(done)
        assert (tmp_path / "run" / "config.json").read_text() == config
    for _ in range(2):
        assert invoke(plan, "--to", "duo-attention", "-o", tmp_path / "pattern", "--overwrite").exit_code == 0


def test_spans_beyond_all_numbers(tiny_folder: Path, shape: Any, tmp_path: Path) -> None:
    file, plan = tmp_path / "moa.json", tmp_path / "plan.json"

    def read(alpha: Any, beta: Any) -> Any:
        spans = {name: [[value] * shape.heads] * shape.layers for name, value in (("alphas", alpha), ("betas", beta))}
        file.write_text(json.dumps(spans))
        return invoke(file, "--from", "moa", "--model", tiny_folder, "-o", plan, "--overwrite")

    done = read(10**400, 0)
    assert done.exit_code == 1
    assert "its alphas are no table of numbers" in said(done)
    for alpha, beta in ((-1.0, 1e306), (1e300, 0.5)):
        assert read(alpha, beta).exit_code == 0
        assert Plan.load(plan).model == shape
    assert "smaller at longer ones" in said(read(-4096, 0.75))
