"""The whole way on a tiny model: what is left on disk, what is reused, and what a kill costs."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from moacompress import pipeline
from moacompress.core.errors import ArtefactError, BudgetError, InfeasibleBudgetError, RecipeError
from moacompress.exporter.exporting import export
from moacompress.models.fingerprint import weights_like
from moacompress.pipeline import compress, quality_table
from moacompress.recipe import Recipe
from moacompress.rules.plan import Plan
from moacompress.search.study import find_plan

SETTINGS = {
    "budget": "50%",
    "calibration": {
        "sources": [{"generator": "needle"}],
        "lengths": [700, 800],
        "samples": 4,
        "validation_samples": 2,
        "answer_tokens": 4,
    },
    "profile": {"draws": 1},
    "search": {"trials": 4, "ablations": 2},
    "evaluation": {"tasks": ["needle-noise"], "lengths": [700], "prompts": 2},
}


@pytest.fixture(scope="module")
def recipe(tiny_folder):
    return Recipe.from_dict({**SETTINGS, "model": str(tiny_folder)})


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    torch.set_num_threads(1)  # as in the processes below: the last bits of a sum depend on it
    out = tmp_path_factory.mktemp("run") / "out"
    return out, compress(recipe, out)


def test_summary_and_artefacts(finished):
    out, summary = finished
    assert json.loads((out / "summary.json").read_text()) == summary
    assert {path.name for path in out.iterdir()} >= {"profile", "plan.json", "model", "eval.json", "summary.json"}
    plan = Plan.load(out / "plan.json")
    assert summary["reference_length"] == 800
    assert summary["kv_bytes"]["planned"] == plan.kv_bytes(800) == summary["kv_bytes"]["measured"]
    assert summary["kv_bytes"]["planned"] <= 0.5 * summary["kv_bytes"]["dense"]
    assert plan.kv_bytes(700) <= 0.5 * plan.model.dense_kv_bytes(700)
    assert set(summary["quality"]["needle-noise@700"]) == {"dense", "uniform", "plan", "prompts", "nll"}
    assert set(summary["seconds"]) == {"profile", "search", "export", "eval"}
    assert plan.provenance["recipe"]["calibration"]["samples"] == 4


def test_second_run_reuses_everything(finished, recipe):
    out, summary = finished
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.suffix != ".lock"}
    begun = time.perf_counter()
    again = compress(recipe, out)
    assert time.perf_counter() - begun < 60
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in summary.items() if k != "seconds"}
    rewritten = {path.name for path, stamp in kept.items() if path.stat().st_mtime_ns != stamp}
    assert rewritten <= {"summary.json", "seconds.json", "eval.json", "plan.json", "profile.json"}


def test_a_run_of_an_older_version_is_taken_up(recipe, tmp_path, monkeypatch):
    """Weights had another fingerprint then: all that it left is still of this model, and nothing is made again."""
    with monkeypatch.context() as older:
        older.setattr("moacompress.models.fingerprint.weights_fingerprint", lambda model: weights_like(model, "0" * 16))
        first = compress(recipe, tmp_path / "out")
    plan = Plan.load(tmp_path / "out" / "plan.json")
    assert len(plan.model.weights_fingerprint) == 16
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    again = compress(recipe, tmp_path / "out")
    assert again["quality"] == first["quality"]
    rewritten = {path.name for path, stamp in kept.items() if path.stat().st_mtime_ns != stamp}
    assert rewritten <= {"summary.json", "seconds.json", "eval.json", "profile.json"}
    assert Plan.load(tmp_path / "out" / "plan.json") == plan


def texts_in(value):
    """Yields every text in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    for item in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from texts_in(item)


def places_in(folder, places):
    """Returns what in the files that may be shared names one of the places, or is an absolute path."""
    found = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"):
        text = file.read_text("utf-8")
        found += [(file.name, place) for place in places if str(place) in text]
        if file.suffix == ".json" and not file.name.startswith("tokenizer"):
            found += [(file.name, text) for text in texts_in(json.loads(text)) if len(text) > 1 and text[0] == "/"]
    return found


@pytest.mark.parametrize("how", ["absolute", "relative"])
def test_nothing_that_is_shared_names_a_place(how, recipe, tiny_folder, tmp_path, monkeypatch):
    work = tmp_path / "work"
    model, prose, notes = work / "models" / "dense", work / "texts" / "prose", work / "texts" / "notes.txt"
    shutil.copytree(tiny_folder, model)
    prose.mkdir(parents=True)
    for file in (prose / "a.txt", prose / "b.txt", prose / "c.txt", notes):
        file.write_text(" ".join(f"On day {n} there were {n * n} of them in {file.stem}." for n in range(800)))
    monkeypatch.chdir(work)
    name = str if how == "absolute" else lambda path: str(path.relative_to(work))
    recipe = recipe.override(
        model=name(model),
        calibration__text=name(prose),
        calibration__sources=[{"generator": "needle", "haystack": "prose"}, {"path": name(notes)}],
        search__storage=name(work / "study.log"),
    )
    out = work / "out"
    summary = compress(recipe, out)
    plan = Plan.load(out / "plan.json")
    assert summary["model"] == plan.provenance["source"] == plan.provenance["recipe"]["model"] == "dense"
    assert plan.provenance["recipe"]["calibration"]["text"] == "prose"
    assert plan.provenance["recipe"]["calibration"]["sources"][1]["path"] == "notes.txt"
    assert json.loads((out / "model" / "recipe.json").read_text()) == plan.provenance["recipe"]
    assert Recipe.from_dict(plan.provenance["recipe"]).override(model=recipe.model) != recipe
    card = (out / "model" / "README.md").read_text()
    assert "# dense, compressed" in card
    assert "base_model" not in card

    shared = tmp_path / "shared"
    shutil.copytree(out / "model", shared / "model")
    shutil.copytree(out / "plan.baselines", shared / "baselines")
    for file in ("plan.json", "plan.explain.json", "summary.json"):
        shutil.copyfile(out / file, shared / file)
    assert len(list(shared.rglob("*.json"))) > 8
    assert places_in(shared, [tmp_path, work.name + "/", "models/", "texts/", Path.cwd(), Path.home()]) == []

    monkeypatch.chdir(tmp_path)  # the profile knows where its model is, and the steps go on from anywhere
    found = find_plan(out / "profile", "60%", out=shared / "other.json")
    assert found.plan.provenance["source"] == "dense"
    export(model, shared / "other.json", shared / "exported")
    assert places_in(shared, [tmp_path, work.name + "/", "models/", "texts/", Path.cwd(), Path.home()]) == []


def test_another_recipe_is_refused_and_overwrite_starts_anew(finished, recipe, tmp_path):
    out, _ = finished
    with pytest.raises(ArtefactError, match="holds another run"):
        compress(recipe.override(seed=1), out)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ArtefactError, match=r"holds another run \(plan.json\)"):
        compress(recipe, tmp_path)
    assert (tmp_path / "plan.json").read_text() == "{}"


def test_what_is_missing_is_said_before_anything_is_written(recipe, tmp_path):
    with pytest.raises(RecipeError, match="no model given"):
        compress(Recipe(budget=("25%",)), tmp_path / "out")
    with pytest.raises(RecipeError, match="no budget given"):
        compress(recipe.override(budget=[]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_budget_that_no_plan_meets(finished, recipe, tmp_path):
    out, _ = finished
    from moacompress.search.study import find_plan

    with pytest.raises(InfeasibleBudgetError, match=r"ask for at least \d+\.\d%"):
        find_plan(out / "profile", "1%")
    with pytest.raises(BudgetError, match="did you mean '25%'"):
        find_plan(out / "profile", "25")


def test_quality_table():
    rows = [
        {"task": "t", "length": 8, "metric": "exact_match", "model": "plan", "value": 0.5, "prompts": 4},
        {"task": "t", "length": 8, "metric": "nll", "model": "plan", "value": 0.7, "prompts": 4},
        {"task": "t", "length": 8, "metric": "retention", "model": "plan", "value": 0.9, "prompts": 2},
        {"task": "text", "length": 8, "metric": "kl", "model": "plan", "value": 0.1, "prompts": 4},
    ]
    assert quality_table(rows) == {"t@8": {"plan": 0.5, "nll": {"plan": 0.7}, "prompts": 4}}


def test_clock_adds_up_over_runs(tmp_path):
    for _ in range(2):
        clock = pipeline._Clock(tmp_path / "seconds.json")
        clock.run("step", lambda: time.sleep(0.06))
    assert json.loads((tmp_path / "seconds.json").read_text())["step"] >= 0.1


def _run(recipe_file, out, kill_after=None):
    """Runs `compress` in a process of its own; kills it without warning after some seconds."""
    command = [sys.executable, "-m", "moacompress", "compress", "--recipe", str(recipe_file), "-o", str(out), "-q"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        _, errors = process.communicate(timeout=kill_after)
        assert process.returncode == 0, errors
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def _comparable(out):
    plan = json.loads((out / "plan.json").read_text())
    results = json.loads((out / "eval.json").read_text())["results"]
    profile = (out / "profile" / "influence.safetensors").read_bytes()
    return plan, results, profile


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.heavy)])
def test_killed_at_random_points_ends_the_same(kills, finished, recipe, tmp_path):
    whole, _ = finished
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(recipe.resolved()))
    rng = random.Random(kills)
    for _ in range(kills):
        _run(file, out, kill_after=rng.uniform(4, 16))
    _run(file, out)
    assert _comparable(out) == _comparable(whole)
    leftovers = [path for path in out.rglob("*") if path.name.endswith((".tmp", ".partial"))]
    assert leftovers == []
