"""lm-evaluation-harness on a tiny model, with local task files and data."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from moacompress.core.errors import DataError, UsageError
from moacompress.core.statistics import wilson
from moacompress.evaluation import lm_harness
from moacompress.evaluation.lm_harness import check_lm_eval, run_lm_eval
from moacompress.models.source import model_shape
from moacompress.rules.plan import Plan
from moacompress.runtime import attach

if TYPE_CHECKING:
    from tests.evaluation.conftest import Forwards


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are cached in a folder of the tests."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def test_rows(
    model: Any, tiny_tokenizer: Any, random_plan: Any, task_folder: Path, capsys: Any, forwards: Forwards
) -> None:
    seen = forwards(model)
    attach(model, random_plan(model_shape(model), seed=1))
    tasks = ["tiny_choice", "tiny_answer", "tiny_text"]
    rows = run_lm_eval(model, tiny_tokenizer, tasks, limit=4, include_path=task_folder, batch_size=1)
    wanted = {"tiny_choice acc", "tiny_answer exact_match", "tiny_answer chrf", "tiny_text word_perplexity"}
    assert {f"{row['task']} {row['metric']}" for row in rows} == wanted | {"tiny_text bits_per_byte"}
    for row in rows:
        assert list(row) == ["model", "task", "length", "metric", "value", "ci95", "prompts", "overlap"]
        assert (row["model"], row["length"], row["prompts"]) == ("plan", None, 4)
        assert row["ci95"] is None  # four documents have no interval
    assert all(count == 1 and (mask is None or bool(mask.all())) for count, _, mask in seen)
    assert capsys.readouterr().out == ""
    seen.clear()
    together = run_lm_eval(model, tiny_tokenizer, tasks, limit=4, include_path=task_folder)
    assert max(count for count, *_ in seen) >= 4
    for one, other in zip(rows, together, strict=True):
        assert {**one, "value": 0, "ci95": 0} == {**other, "value": 0, "ci95": 0}
        assert other["value"] == pytest.approx(one["value"], rel=1e-4)
        assert other["ci95"] == (one["ci95"] and pytest.approx(one["ci95"], rel=1e-4))


def test_rows_of_a_batch_that_fit_the_memory() -> None:
    assert [lm_harness._rows_that_fit(1000, 125, free) for free in (1, 4_000_000, 31_000_000, 10**12)] == [1, 1, 4, 64]


def test_full_span_is_dense(model: Any, tiny_tokenizer: Any, random_plan: Any, task_folder: Path) -> None:
    shape = model_shape(model)
    tasks = ["tiny", "tiny_answer"]
    dense = run_lm_eval(model, tiny_tokenizer, tasks, include_path=task_folder, name="dense")
    tens = dict.fromkeys(("tiny_choice", "tiny_text", "tiny_answer"), 10)
    assert {row["task"]: row["prompts"] for row in dense} == {"tiny": 20, **tens}
    for row in dense:
        if row["task"] != "tiny" and row["metric"] in ("acc", "exact_match"):
            assert row["ci95"] == pytest.approx(wilson(row["value"] * row["prompts"], row["prompts"]))
    full, sparse = (
        run_lm_eval(attach(model, plan), tiny_tokenizer, tasks, include_path=task_folder, name="dense")
        for plan in (Plan.full(shape), random_plan(shape, seed=1))
    )
    assert [row["value"] for row in full] == pytest.approx([row["value"] for row in dense], rel=1e-5)
    assert [row["value"] for row in sparse] != pytest.approx([row["value"] for row in dense], rel=1e-3)


def test_loglikelihood_is_the_models_own(model: Any, tiny_tokenizer: Any, task_folder: Path, capfd: Any) -> None:
    """And where it is to be quiet, nothing is said."""
    rows = run_lm_eval(model, tiny_tokenizer, [str(task_folder / "tiny_text.yaml")], limit=1, quiet=True)
    assert tuple(capfd.readouterr()) == ("", "")
    (value,) = (row["value"] for row in rows if row["metric"] == "bits_per_byte")
    story = json.loads((task_folder / "stories.jsonl").read_text().splitlines()[0])["story"]
    ids = [tiny_tokenizer.bos_token_id, *tiny_tokenizer(story)["input_ids"]]
    logits = model(torch.tensor([ids])).logits[0, :-1]
    nll = float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
    assert value == pytest.approx(nll / len(story) / 0.6931471805599453, rel=1e-4)


def test_bad_requests(model: Any, tiny_tokenizer: Any, task_folder: Path, tmp_path: Path) -> None:
    sizes = "the batch size of lm-evaluation-harness is .*not a positive number, auto or"
    asked: list[tuple[list[str], dict[str, Any], str]] = [
        ([], {}, "nothing to evaluate: 0 tasks"),
        *((["tiny_text"], {"batch_size": size}, sizes) for size in (0, -1, "many", "auto:0")),
        (["tiny_text"], {"limit": 0, "include_path": task_folder}, "limit 0"),
        (["tiny_text"], {"include_path": tmp_path / "missing"}, "no folder of task files"),
        (["missing.yaml"], {}, r"there is no task file missing\.yaml"),
    ]
    for tasks, options, message in asked:
        with pytest.raises(UsageError, match=message):
            run_lm_eval(model, tiny_tokenizer, tasks, **options)
    task = json.loads((task_folder / "tiny_text.yaml").read_text())
    task["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "missing.jsonl")
    (tmp_path / "broken.yaml").write_text(json.dumps(task))
    with pytest.raises(DataError, match=r"cannot run .*broken\.yaml: Unable to find .*missing\.jsonl"):
        run_lm_eval(model, tiny_tokenizer, [str(tmp_path / "broken.yaml")])


@pytest.mark.heavy
def test_all_tasks_are_looked_through_before_one_is_called_unknown() -> None:
    with pytest.raises(UsageError, match="lm-evaluation-harness has no task 'no_such_task'"):
        check_lm_eval(["no_such_task"])


def test_not_installed(model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UsageError, match=r"No module named 'lm_eval.*pip install 'moacompress\[eval\]'"):
        run_lm_eval(model, tiny_tokenizer, ["tiny_text"])


@pytest.mark.heavy
def test_a_checkpoint_in_lm_eval_itself(
    model: Any, tiny_tokenizer: Any, random_plan: Any, task_folder: Path, tmp_path: Path
) -> None:
    """Its own command loads a checkpoint, also where accelerate has two processes share the documents."""
    attach(model, random_plan(model_shape(model), seed=1))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    launch = "-m accelerate.commands.launch --cpu --num_machines 1 --mixed_precision no --num_processes 2 --dynamo_backend no"
    given = f"-m lm_eval --model hf --model_args pretrained={tmp_path / 'model'},dtype=float32 --tasks tiny,tiny_answer"
    given += f" --include_path {task_folder} --device cpu --output_path {tmp_path}/"
    results = []
    for name, program in {"one": [], "two": launch.split()}.items():
        command = [*program, *f"{given}{name}".split()]
        done = subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (found,) = (tmp_path / name).rglob("results_*.json")
        results.append(json.loads(found.read_text())["results"])
    under_plan = run_lm_eval(model, tiny_tokenizer, ["tiny_text"], include_path=task_folder)
    (perplexity,) = (row["value"] for row in under_plan if row["metric"] == "word_perplexity")
    assert results[0]["tiny_text"]["word_perplexity,none"] == pytest.approx(perplexity, rel=1e-4)
    assert {"tiny_choice", "tiny_text", "tiny_answer"} <= set(results[0])
    for task, numbers in results[0].items():
        values = {name: value for name, value in numbers.items() if isinstance(value, float) and "stderr" not in name}
        assert values == pytest.approx({name: results[1][task][name] for name in values}, rel=1e-5)


def test_every_process_needs_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match=r"3 documents .* each of the 4 processes takes one or more"):
        check_lm_eval(["anything"], 3)
