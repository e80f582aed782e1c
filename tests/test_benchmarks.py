"""Every benchmark starts, whatever its neighbours are called: Python looks for modules in a script's folder first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moacompress.evaluation.baselines.compared_models import ComparedModel
from moacompress.evaluation.scoring.prompts import Score
from moacompress.evaluation.scoring.result_rows import Measured, TaskCell
from moacompress.evaluation.scoring.stored_scores import score_rows
from moacompress.kernels.kv_format import decoded, encoded, rounded_by
from moacompress.kernels.reference.rounding import round_to
from tests.search.conftest import make_profile

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


START = """
import contextlib, io, json, runpy, sys
folder = sys.argv[1]
sys.path.insert(0, folder)
import cProfile  # which takes the standard library's `profile` for granted
assert cProfile.run
said = {}
for script in sys.argv[2:]:
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", "")).startswith(folder):
            del sys.modules[name]
    sys.argv = ["", "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        runpy.run_path(f"{folder}/{script}", run_name="__main__")
    said[script] = out.getvalue()
print(json.dumps(said))
"""


def test_they_start() -> None:
    """All in one process, which does not have the tests' modules; what only scripts import has nothing to start."""
    scripts = sorted(path.name for path in FOLDER.glob("*.py") if "__main__" in path.read_text("utf-8"))
    assert len(scripts) > 10
    command = [sys.executable, "-c", START, str(FOLDER), *scripts]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    assert [script for script in scripts if not said[script].startswith("usage: ")] == []


def test_tables_of_ways_to_evict(
    load_script: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows made by the product of known scores: shares, retention and differences are those that stand in the tables."""
    script, cells, fields = load_script(FOLDER / "eviction_tables.py"), [], []
    matches = {"easy": {"plan": "1111", "dense": "1111", "poor": "0011", "other:seen": "0111"}}
    matches["hard"] = {"plan": "1001", "dense": "1101", "poor": "0000", "other:seen": "0000"}
    matches["none"] = dict.fromkeys(matches["hard"], "0000")
    matches = {
        task: {"plan": said["plan"], "dense": said["dense"], "dense:transformers": said["dense"], **said}
        for task, said in matches.items()
    }
    taken = {"plan": 130, "dense": 1000, "dense:transformers": 1000, "poor": 131, "other:seen": 130}
    for task, sides in matches.items():
        cells.append(TaskCell(task, 2048, 4, 2000))
        fields.append([
            Measured(ComparedModel(name, taken[name]), [
                Score(float(match), float(match), 0.25 + number) for match in said
            ])
            for number, (name, said) in enumerate(sides.items())
        ])  # fmt: skip
    rows = [row for cell, field in zip(cells, fields, strict=True) for row in score_rows(cell, field)]
    found: dict[str, Any] = {"checkpoint": {"plan": "p"}, "answers": [{"question": "a text"}], "scores": rows}
    (tmp_path / "eval.json").write_text(json.dumps(found))
    evaluation = script.Evaluation(tmp_path / "eval.json")
    lines = script.side_table(evaluation).splitlines()
    assert "retention, of 7 |" in lines[0]
    assert lines[2].startswith("| `plan` | 13.0% | 0.86 [")
    assert lines[2].endswith("| 0.250 |  |  |")
    assert lines[5].startswith("| `poor` | 13.1% | 0.29 [")
    assert "] | 3.250 | +0.57 [+" in lines[5]
    assert lines[5].endswith("| -3.00 [-3.00, -3.00], p < .001 |")
    assert script.task_table([evaluation, evaluation], ["other:seen"]).splitlines()[2:] == [
        "| `easy` | 4 of 4, 4 of 4 | 1.00, 1.00 | 0.75, 0.75 | 0.50, 0.50 |",
        "| `hard` | 3 of 4, 3 of 4 | 0.67, 0.67 | 0.00, 0.00 | 0.00, 0.00 |",
        "| `none` | 0 of 4, 0 of 4 | -, - | -, - | -, - |",
    ]
    monkeypatch.setattr(
        "sys.argv", ["eviction_tables.py", str(tmp_path / "eval.json"), "--keep", str(tmp_path / "data")]
    )
    script.main()
    kept = json.loads((tmp_path / "data" / "eval.json").read_text())
    assert kept == {"checkpoint": {"plan": "p"}, "scores": rows}  # and no text
    assert script.side_table(script.Evaluation(tmp_path / "data" / "eval.json")).splitlines() == lines
    (tmp_path / "none.json").write_text(json.dumps({"results": []}))
    with pytest.raises(SystemExit, match=r"none\.json has no scores of single prompts; evaluate again"):
        script.Evaluation(tmp_path / "none.json")
    (tmp_path / "one.json").write_text(json.dumps({"scores": [row for row in rows if row["task"] == "easy"]}))
    with pytest.raises(SystemExit, match=r"one\.json: an evaluation of two tasks or more"):
        script.Evaluation(tmp_path / "one.json")


def test_rungs(load_script: Callable[[Path], Any]) -> None:
    """Every rung keeps as many bytes as it says; integers are the reference's codes, and more bits or a fit lose less."""
    script, lost = load_script(FOLDER / "rungs.py"), {}
    for dim in (64, 80):
        x = torch.randn(64, dim)
        for rung in script.RUNGS:
            kept = encoded(rung, x, rung.vector_bytes(dim, "bfloat16"))
            found = decoded(rung, kept, dim)
            lost[rung.name] = float((found - x).square().mean())
            if rung.name.startswith("int"):
                assert torch.equal(found, round_to(x, rung.bits))
            assert not rounded_by(rung, torch.tensor([[torch.inf] + [0.0] * (dim - 1)])).isfinite().all()
            assert not rounded_by(rung, torch.zeros(1, dim)).any()
            assert rounded_by(rung, x[:0]).shape == (0, dim)
        assert sorted(lost, key=lost.__getitem__) == ["int5", "gauss3", "int3", "gauss2"]
        assert script.RUNGS[-1].vector_bytes(dim, "bfloat16") == 2 + dim // 4


def test_variants(load_script: Callable[[Path], Any]) -> None:
    """A plan without a kind of samples is that of a profile which never had them; formats are those on offer."""
    script = load_script(FOLDER / "variants.py")

    def profile_of(chosen: range) -> Any:
        profile = make_profile(formats=True).subset(chosen)
        kinds = [SimpleNamespace(source=("needle/noise", "records/codes")[number % 2]) for number in chosen]
        object.__setattr__(profile, "calibration_samples", lambda: kinds)
        return profile

    whole, needles = profile_of(range(8)), profile_of(range(0, 8, 2))
    found = script.own_plan(whole, "12%", None, "key-value,records")
    assert (
        found.key() == script.own_plan(needles, "12%", None, "").key() != script.own_plan(whole, "12%", None, "").key()
    )
    assert found.quality["predicted_harm"] > 0
    formats = {
        offered: {rule.key_format for row in script.own_plan(whole, "25%", offered, "").rules for rule in row}
        for offered in ("int8", "native")
    }
    assert "int8" in formats["int8"]
    assert formats["native"] == {"native"}
