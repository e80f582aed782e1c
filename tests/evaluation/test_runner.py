"""Evaluation of a tiny compressed checkpoint: rows, resuming, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import moacompress.evaluation.runner as runner
import moacompress.evaluation.scoring as scoring
from moacompress.calibration.pools import draw_numbers
from moacompress.errors import DataError, InfeasibleBudgetError, PlanError, UsageError
from moacompress.evaluation import evaluate
from moacompress.plan import Plan, Rule
from moacompress.progress import Progress

LENGTH = 700


def run(target: Path, **options: Any) -> dict[str, Any]:
    return evaluate(target, **{"lengths": (LENGTH,), "prompts": 3, **options})


def count_scores(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[str]:
    seen: list[str] = []
    original = scoring.score_case

    def counted(model: Any, tokenizer: Any, case: Any) -> Any:
        if len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(case.task)
        return original(model, tokenizer, case)

    monkeypatch.setattr(runner, "score_case", counted)
    return seen


def test_rows(compressed: Path) -> None:
    report = run(compressed, tasks=("needle-noise", "key-value"), against=("dense", "uniform", "uniform:4"))
    rows = report["results"]
    assert [(row["task"], row["model"], row["metric"]) for row in rows] == [
        (task, model, metric)
        for task in ("needle-noise", "key-value")
        for model in ("plan", "dense", "uniform", "uniform:4")
        for metric in ("exact_match", "nll")
    ]
    plan = Plan.load(compressed / "model" / "plan.json")
    for row in rows:
        low, high = row["ci95"]
        assert low <= row["value"] <= high
        assert (row["length"], row["prompts"]) == (LENGTH, 3)
        assert LENGTH - 40 < row["tokens"] <= LENGTH
        bytes_ = {"plan": plan.kv_bytes(row["tokens"]), "dense": plan.model.dense_kv_bytes(row["tokens"])}
        assert row["kv_bytes"] == bytes_.get(row["model"], row["kv_bytes"])
        assert row["kv_bytes"] <= bytes_["dense" if row["model"] == "dense" else "plan"]
        assert ("sink" in row) == row["model"].startswith("uniform")
    value = {(row["task"], row["model"], row["metric"]): row["value"] for row in rows}
    for row in report["differences"]:
        ours, theirs = (value[row["task"], model, row["metric"]] for model in ("plan", row["model"]))
        assert row["value"] == pytest.approx(ours - theirs, abs=1e-12)
        assert row["ci95"][0] <= row["value"] <= row["ci95"][1]
    assert len(report["differences"]) == 2 * 3 * 2
    assert value["needle-noise", "uniform", "nll"] <= value["needle-noise", "uniform:4", "nll"]


def test_dense_is_the_model_without_a_plan(compressed: Path, tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moacompress.evaluation.tasks import make_cases

    report = run(compressed, against=("dense",), seed=3)
    dense: Any = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_folder)
    cases = make_cases("needle-noise", LENGTH, 3, 3, tokenizer, None)
    wanted = sum(scoring.score_case(dense, tokenizer, case).nll for case in cases) / 3
    rows = {row["model"]: row["value"] for row in report["results"] if row["metric"] == "nll"}
    assert rows["dense"] == pytest.approx(wanted, abs=1e-6)
    assert rows["plan"] != pytest.approx(wanted, abs=1e-3)


def test_uniform_has_the_sink_that_the_search_found(compressed: Path, tmp_path: Path) -> None:
    shutil.copytree(compressed, tmp_path / "OUT")
    path = tmp_path / "OUT" / "model" / "plan.json"
    plan = Plan.load(path)
    plan.with_notes(quality={"baselines": {"uniform": {"sink": 16}}}).save(path)
    report = run(tmp_path / "OUT" / "model", against=("uniform",), prompts=1)
    assert [row["sink"] for row in report["results"] if row["model"] == "uniform"] == [16, 16]


def test_killed_and_resumed(compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = run(compressed, against=("dense",), out=tmp_path / "whole.json")
    assert json.loads((tmp_path / "whole.json").read_text()) == wanted
    out, scores = tmp_path / "eval.json", tmp_path / "eval.scores.jsonl"
    with monkeypatch.context() as patch:
        count_scores(patch, stop_after=4)
        with pytest.raises(KeyboardInterrupt):
            run(compressed, against=("dense",), out=out)
    assert not out.exists()
    scores.write_text(scores.read_text()[:-20])  # the last line was cut off
    with monkeypatch.context() as patch:
        seen = count_scores(patch)
        assert run(compressed, against=("dense",), out=out) == wanted
        assert len(seen) == 3
        assert run(compressed, against=("dense",), out=out) == wanted
        assert len(seen) == 3
        run(compressed, against=("dense",), out=out, prompts=4)
        assert len(seen) == 5
        run(compressed, against=("dense",), out=out, seed=1)
        assert len(seen) == 11


def test_progress(compressed: Path) -> None:
    class Recorder(Progress):
        def __init__(self) -> None:
            self.calls: list[Any] = []

        def start(self, what: str, total: int) -> None:
            self.calls.append(total)

        def step(self, note: str = "") -> None:
            self.calls.append(note)

    recorder = Recorder()
    run(compressed, against=(), prompts=2, progress=recorder)
    assert recorder.calls == [2, "plan needle-noise 700", "plan needle-noise 700"]


def test_prose(compressed: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("Once upon a time there was a king. " * 100)
    report = run(compressed, against=(), tasks=("needle-prose",), text=tmp_path / "t.txt", prompts=1)
    assert report["results"][0]["task"] == "needle-prose"


def test_prompts_are_of_the_evaluation_pool(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = []

    def recorded(rng: Any, split: Any, count: int) -> list[str]:
        splits.append(split)
        return draw_numbers(rng, split, count)

    monkeypatch.setattr("moacompress.calibration.generators.draw_numbers", recorded)
    run(compressed, against=(), prompts=2)
    assert splits == ["evaluation"] * 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tasks": ("needle",)}, UsageError, "unknown task 'needle'; did you mean 'needle-"),
        ({"against": ("dence",)}, UsageError, "can not evaluate against 'dence'; did you mean 'dense'"),
        ({"against": ("uniform:5",)}, UsageError, "can not evaluate against 'uniform:5'; did you mean 'uniform:"),
        ({"prompts": 0}, UsageError, "nothing to evaluate"),
        ({"dtype": "int8"}, UsageError, "dtype 'int8' is not one of auto"),
        ({"tasks": ("needle-prose",)}, DataError, "needle-prose needs prose"),
        ({"lengths": (64,)}, DataError, r"takes at least \d+ tokens; 64 were asked for"),
        ({"lengths": (8192,)}, DataError, "8,192 tokens were asked for; the model was made for at most 4,096"),
    ],
)
def test_bad_requests(compressed: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(compressed, **options)


def test_not_compressed(compressed: Path, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a model but not a compressed one; compress it first"):
        run(tiny_folder)
    with pytest.raises(UsageError, match="no compressed checkpoint and holds none under model/"):
        run(tmp_path)
    shutil.copytree(compressed, tmp_path / "OUT")
    (tmp_path / "OUT" / "model" / "plan.json").unlink()
    with pytest.raises(PlanError, match=r"can not read plan .*No such file"):
        run(tmp_path / "OUT")


def test_no_uniform_window_is_small_enough(compressed: Path) -> None:
    plan = Plan.load(compressed / "model" / "plan.json")
    smallest = Plan.uniform(plan.model, Rule(4, 32, 0), 32)
    with pytest.raises(InfeasibleBudgetError, match="sink of 64"):
        runner._contenders(smallest, ("uniform:64",), 700)
    assert [c.sink for c in runner._contenders(smallest, ("uniform",), 700)] == [None, 4, 16]  # one block
