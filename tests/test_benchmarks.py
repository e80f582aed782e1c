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

import numpy as np
import pytest
import torch

from moacompress.evaluation.baselines.compared_models import ComparedModel
from moacompress.evaluation.scoring.prompts import Score
from moacompress.evaluation.scoring.result_rows import Measured, TaskCell
from moacompress.evaluation.scoring.stored_scores import score_rows
from moacompress.prompts.pools import Prose

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
    assert len(scripts) > 20
    command = [sys.executable, "-c", START, str(FOLDER), *scripts]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    assert [script for script in scripts if not said[script].startswith("usage: ")] == []


def test_a_checkpoint_of_random_blocks_loads(
    load_script: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load_script(FOLDER / "loading_memory.py")
    small = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(script, "SHAPE", {**script.SHAPE, **small, "vocab_size": 640})
    for name in (*script.SCALES, script.NUMBERS):
        script.write_checkpoint(tmp_path / name, 2, name)
        found = script.loaded(tmp_path / name)
        assert found["finite"]
        config = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert set(config.get("weights", {}).values()) == {name} - {script.NUMBERS}


@pytest.mark.heavy
def test_loading_in_the_shape_of_8b_takes_the_memory_of_the_files(tmp_path: Path) -> None:
    """Two layers with embedding and output layer, 1.07 GB; the script alone has 32."""
    command = [sys.executable, str(FOLDER / "loading_memory.py"), str(tmp_path / "model"), "--layers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout.split("(")[1].split()[0]) <= 1.1
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 40])
def test_streaming_heads_see_sinks_and_window(load_script: Callable[[Path], Any], tokens: int) -> None:
    script, back = load_script(FOLDER / "duo_attention.py"), torch.arange(tokens)[:, None] - torch.arange(tokens)
    query, key, value = (torch.randn(1, 3, tokens, 16) for _ in range(3))
    seen = (back >= 0) & ((back < 8) | (torch.arange(tokens) < 5))
    wanted = torch.softmax((query @ key.mT / 4).masked_fill(~seen, -torch.inf), -1) @ value
    assert torch.allclose(script.streaming_attention(query, key, value, 5, 8, 0.25), wanted, atol=1e-6)


def test_weights_of_heads_are_trained_and_go_on(
    load_script: Callable[[Path], Any], tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    script, model = load_script(FOLDER / "duo_attention.py"), tiny_model("llama")
    shape = model.config.num_hidden_layers, model.config.num_key_value_heads

    def prompt(step: int) -> tuple[list[int], int]:
        return torch.randint(3, 60, (50,), generator=torch.Generator().manual_seed(step)).tolist(), 9

    def trained(out: str, steps: int, price: float, whole: int = 6) -> torch.Tensor:
        heads = script.Heads(shape, 4, 8)
        script.train(
            model, heads, lambda step: prompt(step) if step < steps else 1 / 0, tmp_path / out, whole, price, 1
        )
        return heads.weights.detach()

    whole = trained("whole", 6, 0.05)
    with pytest.raises(ZeroDivisionError):
        trained("parts", 3, 0.05)
    assert torch.equal(trained("parts", 6, 0.05), whole)
    assert 0.8 < whole.min() < 1
    assert trained("free", 6, 0.0).mean() > whole.mean()
    pattern = tmp_path / "whole"
    assert np.allclose(np.loadtxt(pattern / "full_attention_heads.tsv"), whole)
    assert json.loads((pattern / "config.json").read_text()) == {"sink_size": 4, "recent_size": 8}


def test_pass_phrases_stand_in_the_text(
    load_script: Callable[[Path], Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    script = load_script(FOLDER / "duo_attention.py")
    (tmp_path / "text.txt").write_text(" ".join(f"It rained on day {n}. Nobody went out." for n in range(900)))
    prose, source = Prose.load(tmp_path / "text.txt"), SimpleNamespace(tokenizer=tiny_tokenizer)
    ids, answer = script.make_prompt(source, prose, np.random.default_rng(0), 600, 3, 2)
    said = tiny_tokenizer.decode(ids[-answer:])
    asked = tiny_tokenizer.decode(ids[:-answer])
    for name in ("first", "second", "third"):
        (line,) = [part for part in said.split(". ") if f"The {name} pass" in part]
        assert line.strip().rstrip(".") in asked
    assert abs(len(ids) - 600) < 60


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
