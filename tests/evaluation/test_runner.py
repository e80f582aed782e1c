"""Evaluation of a tiny compressed checkpoint: rows, resuming, several processes, and refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import moacompress.evaluation.baselines.comparison as comparison
import moacompress.evaluation.runner as runner
import moacompress.evaluation.scoring.prompts as scoring
import moacompress.evaluation.scoring.scores as scores
import moacompress.evaluation.tasks.registry as tasks
from moacompress.cli import app
from moacompress.core.errors import ArtefactError, DataError, InfeasibleBudgetError, PlanError, UsageError
from moacompress.core.progress import Progress
from moacompress.evaluation.baselines.compared_models import ComparedModel
from moacompress.evaluation.baselines.comparison import Comparison
from moacompress.evaluation.runner import evaluate
from moacompress.evaluation.tasks.registry import Resources, find_task
from moacompress.models.source import model_shape
from moacompress.prompts import sentences
from moacompress.prompts.pools import Prose
from moacompress.prompts.sentences import EVALUATION_NEEDLES
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.runtime import attach, detach
from moacompress.runtime.checkpoint import load_checkpoint
from tests.preloaded import Preloaded

LENGTH = 700


def run(target: Path, **options: Any) -> dict[str, Any]:
    asked = {"tasks": ("needle-noise",), "lengths": (LENGTH,), "prompts": 3, "against": ("dense", "uniform"), **options}
    return evaluate(target, **asked)


def count_batches(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[str]:
    seen: list[str] = []

    def counted(model: Any, tokenizer: Any, cases: Any, *arguments: Any) -> Any:
        if len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(cases[0].task)
        return scoring.score_batch(model, tokenizer, cases, *arguments)

    monkeypatch.setattr(scores, "score_batch", counted)
    return seen


def values(report: dict[str, Any], *columns: str) -> dict[tuple[Any, ...], float]:
    return {tuple(row[column] for column in columns): row["value"] for row in report["results"]}


def full_span(place: Path) -> Path:
    """Makes a run's folder whose plan keeps everything, in other words than `Plan.full`."""
    shutil.copytree(place, place.parent / "full")
    folder = place.parent / "full" / "model"
    plan = Plan.load(folder / "plan.json")
    rules = tuple(tuple(Rule(16, 7 * head, 1024) for head, _ in enumerate(row)) for row in plan.rules)
    full = Plan(plan.model, 64, rules)
    assert full.key() != Plan.full(plan.model).key()
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    attach(detach(model), full).save_pretrained(folder)
    full.save(folder / "plan.json")
    return place.parent / "full"


def note(folder: Path, **notes: Any) -> None:
    """Notes something in a checkpoint's plan, in both of its files."""
    plan = Plan.load(folder / "plan.json").with_notes(**notes)
    plan.save(folder / "plan.json")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["plan"] = plan.to_dict()
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    folder = tmp_path / "prose"
    folder.mkdir()
    for name in "abcdef":
        text = " ".join(f"The {name} of day {n} was seen by {n * n} people." for n in range(200))
        (folder / f"{name}.txt").write_text(text)
    return folder


class Recorder(Progress):
    """Notes what is said of the work."""

    def __init__(self) -> None:
        self.totals: list[int] = []
        self.steps: list[str] = []

    def start(self, what: str, total: int) -> None:
        self.totals.append(total)

    def step(self, note: str = "") -> None:
        self.steps.append(note)


def test_rows(compressed: Path) -> None:
    said = Recorder()
    sides = ("dense", "uniform", "uniform:4")
    report = run(compressed, tasks=("needle-noise", "key-value"), against=sides, progress=said)
    assert said.totals == [len(said.steps)]
    assert said.steps.count("plan needle-noise 700") == 3
    rows = report["results"]
    assert [(row["task"], row["model"], row["metric"]) for row in rows] == [
        (task, model, metric)
        for task in ("needle-noise", "key-value")
        for model in ("plan", *sides)
        for metric in ("exact_match", "accuracy", "nll")
    ]
    plan = Plan.load(compressed / "model" / "plan.json")
    for row in rows:
        assert row["ci95"] is None  # three prompts have no interval
        assert (row["length"], row["prompts"]) == (LENGTH, 3)
        assert LENGTH - 40 < row["tokens"] <= LENGTH
        bytes_ = {"plan": plan.kv_bytes(row["tokens"]), "dense": plan.model.dense_kv_bytes(row["tokens"])}
        assert row["kv_bytes"] == bytes_.get(row["model"], row["kv_bytes"])
        assert row["kv_bytes"] <= bytes_["dense" if row["model"] == "dense" else "plan"]
        assert ("sink" in row) == ("window" in row) == row["model"].startswith("uniform")
    value = {(row["task"], row["model"], row["metric"]): row["value"] for row in rows}
    for row in report["differences"]:
        ours, theirs = (value[row["task"], model, row["metric"]] for model in ("plan", row["model"]))
        assert row["value"] == pytest.approx(ours - theirs, abs=1e-12)
        assert (row["ci95"], row["p"]) == (None, 1.0 if row["value"] == 0 else pytest.approx(row["p"], abs=1))
    assert len(report["differences"]) == 2 * 3 * 3
    assert report["at_floor"] == []  # three prompts cannot show that
    assert value["needle-noise", "uniform", "nll"] <= value["needle-noise", "uniform:4", "nll"]


def test_every_baseline_has_the_sink_that_the_search_found(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = load_checkpoint(compressed / "model", "auto", "cpu")
    made = [Plan.uniform(checkpoint.plan.model, Rule(sink, 64, 0), 32) for sink in (4, 16, 64)]
    monkeypatch.setattr(comparison, "baseline_plans", lambda *arguments, **options: made)
    for name, family in (("split", "duo"), ("per-layer", "per_layer"), ("uniform", "uniform"), ("moa", "moa")):
        plan = checkpoint.plan.with_notes(quality={"baselines": {family: {"sink": 16}}})
        for every_candidate, sinks in ((False, [16]), (True, [4, 16, 64])):
            compared = Comparison(replace(checkpoint, plan=plan), (name,), {}, None, every_candidate).at(LENGTH, 8)
            assert [candidate.description(LENGTH)["sink"] for candidate in compared[1:]] == sinks, name


def test_killed_and_resumed(compressed: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"against": ("dense",), "tasks": ("needle-noise", "text"), "text": prose, "prompts": 4}
    monkeypatch.setattr(scoring, "BATCH_TOKENS", LENGTH)  # one prompt a batch
    wanted = run(compressed, **options, out=tmp_path / "whole.json")
    assert json.loads((tmp_path / "whole.json").read_text()) == wanted
    out, filed = tmp_path / "eval.json", tmp_path / "eval.scores.jsonl"
    with monkeypatch.context() as patch:
        whole = count_batches(patch)
        run(compressed, **options)
    assert len(whole) == 8
    with monkeypatch.context() as patch:
        count_batches(patch, stop_after=4)
        with pytest.raises(KeyboardInterrupt):
            run(compressed, **options, out=out)
    assert not out.exists()
    filed.write_text(filed.read_text()[:-20])  # the last line was cut off
    with monkeypatch.context() as patch:
        seen = count_batches(patch)
        assert run(compressed, **options, out=out) == wanted
        assert len(seen) == len(whole) - 3
        assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
        patch.setattr(scores, "read", None)  # nothing is read again
        assert run(compressed, **options, out=out) == wanted
        assert len(seen) == len(whole) - 3
    with monkeypatch.context() as patch:
        seen = count_batches(patch)
        run(compressed, **{**options, "tasks": ("needle-noise",)}, out=out, seed=1)
        assert len(seen) >= 4


def test_prompts_in_another_wording_are_scored_again(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "eval.json"
    options: dict[str, Any] = {"against": (), "tasks": ("needle-noise", "recall"), "out": out}
    before = run(compressed, **options)
    assert before["wording"] == {name: find_task(name).wording for name in ("needle-noise", "recall")}
    seen = count_batches(monkeypatch)
    assert run(compressed, **options) == before
    assert (seen, caplog.text) == ([], "")
    said = replace(EVALUATION_NEEDLES, needle="Keep in mind that {key} has the {kind} {value}.")
    for module in (sentences, tasks):
        monkeypatch.setattr(module, "EVALUATION_NEEDLES", said)
    after = run(compressed, **options)
    assert set(seen) == {"needle-noise"}
    changed = [name for name, wording in after["wording"].items() if wording != before["wording"][name]]
    assert changed == ["needle-noise"]
    assert "has numbers of other prompts of the same name (needle-noise, in another wording); they are" in caplog.text


def test_a_folder_whose_plan_keeps_everything_is_dense_to_the_bit(
    compressed: Path, prose: Path, tmp_path: Path
) -> None:
    shutil.copytree(compressed, tmp_path / "OUT")
    full = str(full_span(tmp_path / "OUT"))
    tasks = ("needle-noise", "second-question", "line-lookup", "text")
    report = run(compressed, tasks=tasks, against=("dense", full), text=prose)
    for kind in ("results", "differences"):
        by_model: dict[str, list[Any]] = {"dense": [], full: []}
        for row in report[kind]:
            if row["model"] in by_model:
                assert "sink" not in row
                by_model[row["model"]].append({name: item for name, item in row.items() if name != "model"})
        assert by_model[full] == by_model["dense"]
    assert len(report["differences"]) == 2 * (3 * 3 + 4)


def test_text(compressed: Path, prose: Path) -> None:
    report = run(compressed, tasks=("text",), text=prose, against=("dense", "uniform"), prompts=4)
    found = values(report, "model", "metric")
    assert [row["metric"] for row in report["results"][:4]] == ["ppl_early", "ppl_late", "kl", "top1_agreement"]
    assert (found["dense", "kl"], found["dense", "top1_agreement"]) == (0.0, 1.0)
    assert found["plan", "kl"] > 0.01
    assert 0 < found["plan", "top1_agreement"] < 1
    for row in report["results"]:
        assert row["ci95"] is None  # of four documents
        assert (row["task"], row["length"], row["tokens"], row["prompts"]) == ("text", LENGTH, LENGTH, 4)
        assert row["documents"] == 4
    for row in report["differences"]:
        ours, theirs = (found[model, row["metric"]] for model in ("plan", row["model"]))
        assert row["value"] == pytest.approx(ours - theirs)


def test_at_floor(compressed: Path) -> None:
    report = run(compressed, against=("dense",), prompts=20)
    assert values(report, "model", "metric")["dense", "exact_match"] == 0.0
    assert report["at_floor"] == [{"task": "needle-noise", "length": LENGTH}]
    assert not [row for row in report["results"] if row["metric"] == "retention"]


def test_folders_of_other_weights_are_refused(
    compressed: Path, tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    for changes, said in (
        ({"seed": 5}, "was made from other weights than those that .* is measured beside.*--dense MODEL"),
        ({"num_hidden_layers": 2}, "another model: it is for"),
    ):
        model = tiny_model("llama", **changes)
        plan = Plan.full(model_shape(model))
        attach(model, plan).save_pretrained(tmp_path)
        tiny_tokenizer.save_pretrained(tmp_path)
        plan.save(tmp_path / "plan.json")
        with pytest.raises(PlanError, match=said):
            run(compressed, against=("dense", str(tmp_path)))


def test_best_candidate_is_measured(compressed: Path, tmp_path: Path) -> None:
    shutil.copytree(compressed, tmp_path / "OUT")
    note(tmp_path / "OUT" / "model", quality={"baselines": {"uniform": {"harm": 1.0}}})  # best with native formats
    names = ("uniform:4", "uniform:16", "uniform:64")
    one = {name: run(tmp_path / "OUT", against=(name,)) for name in ("uniform", *names)}
    nll = {name: values(report, "model", "metric")[name, "nll"] for name, report in one.items()}
    best = min(names, key=lambda name: nll[name])
    assert nll["uniform"] == nll[best]
    row = next(row for row in one["uniform"]["results"] if row["model"] == "uniform")
    assert row["sink"] == int(best.partition(":")[2])
    assert row["formats"] == "native/native"


def test_groups_of_tasks(prose: Path) -> None:
    assert runner.task_names(("text", "key-value", "text", "key-value")) == ["key-value", "text"]
    assert "text" not in runner.task_names(("all",))
    everything = runner.task_names(("all",), Resources(prose=Prose.load(prose)))
    assert everything[-1] == "text"
    assert "niah-single-2" in everything
    assert "qa-squad" not in everything


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"against": ("uniform:5",)}, UsageError, "cannot evaluate against 'uniform:5'; did you mean 'uniform:"),
        ({"prompts": 0}, UsageError, "nothing to evaluate"),
        ({"dtype": "int8"}, UsageError, "dtype 'int8' is not one of auto"),
        ({"tasks": ("qa-squad",), "squad": "missing.json"}, DataError, "missing.json"),
        ({"against": ("split",), "profile": "missing"}, ArtefactError, "missing"),
        ({"lengths": (64,)}, DataError, r"takes at least \d+ tokens; 64 were asked for"),
        ({"lengths": (8192,)}, DataError, "8,192 tokens were asked for; the model was made for at most 4,096"),
    ],
)
def test_bad_requests(compressed: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    """Those that the command does not meet first: others are in tests/cli/test_refusals.py."""
    with pytest.raises(error, match=message):
        run(compressed, **options)


def test_the_plan_is_that_of_the_config(compressed: Path, tmp_path: Path) -> None:
    """`plan.json` need not be there, and must not say anything else."""
    shutil.copytree(compressed, tmp_path / "OUT")
    file = tmp_path / "OUT" / "model" / "plan.json"
    plan = Plan.load(file)
    Plan.full(plan.model).save(file)
    with pytest.raises(PlanError, match=r"plan\.json is not the plan in config\.json, which is the one that runs: min"):
        run(tmp_path / "OUT")
    file.unlink()
    assert run(tmp_path / "OUT")["results"] == run(compressed)["results"]


def test_no_uniform_window_is_small_enough(compressed: Path) -> None:
    checkpoint = load_checkpoint(compressed / "model", "auto", "cpu")
    checkpoint = replace(checkpoint, plan=Plan.uniform(checkpoint.plan.model, Rule(4, 32, 0), 32))

    def at(name: str) -> list[ComparedModel]:
        return Comparison(checkpoint, (name,), {}, None, True).at(700, 8)

    with pytest.raises(InfeasibleBudgetError, match="sink of 64"):
        at("uniform:64")
    plan_itself, *candidates = [compared.description(700) for compared in at("uniform")]
    assert plan_itself == {}
    native = [found for found in candidates if found["formats"] == "native/native"]
    assert [found["sink"] for found in native] == [4, 16]  # one block of sinks
    assert all(found["window"] >= 32 for found in candidates)
    widest = {found["formats"]: found["window"] for found in candidates if found["sink"] == 4}
    assert widest["native/native"] < widest["int8/int8"] < widest["int8/int4"] < widest["int4/int4"]


def test_two_processes_measure_what_one_does(
    compressed: Path,
    prose: Path,
    task_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preloaded: Preloaded,
) -> None:
    """And take up what one left; of an odd number of documents one process has one more than the other."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    options = f"--tasks needle-noise,text --text {prose} --lengths 700 --prompts 3 --against dense".split()
    options += ["--lm-eval", str(task_folder / "tiny_choice.yaml"), "--json"]

    out, scores = tmp_path / "one.json", tmp_path / "one.scores.jsonl"
    alone = CliRunner().invoke(app, ["eval", str(compressed), *options, "-o", str(out)])
    assert alone.exit_code == 0, alone.stderr
    expected: dict[str, Any] = json.loads(alone.stdout)

    begun, kept = tmp_path / "two.json", tmp_path / "two.scores.jsonl"
    lines = scores.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[::2]))  # every batch of several prompts lacks some
    csv, low = tmp_path / "rows.csv", ("--fail-under", "exact_match=0.99")
    ran = preloaded.run("eval", compressed, *options, "-o", begun, "--csv", csv, *low, ranks=2)
    assert ran.returncode != 0  # the plan of a random model is below the threshold
    found = json.loads(ran.stdout)
    assert len(found.pop("failures")) == 1
    assert ran.stderr.count("below the threshold") == 1
    assert json.loads(begun.read_text()) == found
    assert csv.read_text().count("\n") > 5
    written = kept.read_text().splitlines()
    assert sorted(json.loads(line)["key"] for line in written) == sorted(json.loads(line)["key"] for line in lines)
    assert found.keys() == expected.keys()
    assert found["checkpoint"] == expected["checkpoint"]
    for name in ("results", "differences", "lm_eval"):
        assert len(found[name]) == len(expected[name])
        for ours, theirs in zip(found[name], expected[name], strict=True):
            assert {**ours, "value": 0, "ci95": 0} == {**theirs, "value": 0, "ci95": 0}
            assert ours["value"] == pytest.approx(theirs["value"], abs=1e-9), (name, ours)
