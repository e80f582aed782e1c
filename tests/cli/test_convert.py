"""Plans of other projects by the command line: in, exported and out again; and what is wrong is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moacompress.cli import app
from moacompress.rules.plan import Plan


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.json"], "one of --from and --to"),
        (["x.json", "--from", "moa", "--to", "moa"], "one of --from and --to"),
        (["x.json", "--from", "moa"], "does not know its model"),
        (["x.json", "--from", "moa", "--model", "m"], "it needs `alphas` and `betas`"),
        (["nowhere", "--from", "duo-attention", "--model", "m"], "config.json"),
        (["d", "--from", "duo-attention", "--model", "m"], "it needs `sink_size` and `recent_size`"),
        (["e", "--from", "duo-attention", "--model", "m"], "is no table of numbers"),
        (["nowhere", "--to", "moa"], "does not exist"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.json").write_text("{}")
    for folder, config in (("d", {}), ("e", {"sink_size": 64, "recent_size": 256})):
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text(json.dumps(config))
        (Path(folder) / "full_attention_heads.tsv").write_text("a\tb\n")
    done = invoke(*arguments, "-o", "out.json")
    assert done.exit_code in (1, 2)
    assert message in said(done)
    assert not Path("out.json").exists()
