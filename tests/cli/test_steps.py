"""The commands one after another on a tiny model: each takes what the one before left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moacompress.cli import app
from moacompress.doctor import checks
from moacompress.rules.plan import Plan

RUNNER = CliRunner()
SMALL = ["--samples", "2", "--validation-samples", "2", "--set", "profile.draws=1", "--source", "needle", "--seed", "3"]


def run(*arguments: str | Path, exit_code: int = 0) -> Any:
    """Runs a command with --json and returns its object."""
    result = RUNNER.invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == exit_code, result.stderr
    assert result.stdout.count("\n") == (exit_code == 0)
    return json.loads(result.stdout) if exit_code == 0 else result.stderr


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `doctor` ask no fresh process, which is seconds of importing; `tests/doctor` has it asked."""
    monkeypatch.setattr(checks, "_check_autoload", lambda: {"registered": True, "switch": None, "reason": None})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Returns a folder with a profile, a plan and an exported model."""
    place = tmp_path_factory.mktemp("steps")
    made = run("profile", tiny_folder, "-o", place / "profile", "--lengths", "768", *SMALL)
    assert (made["lengths"], made["samples"], made["layers"], made["kv_heads"]) == ([768], 2, 3, 2)
    found = run("search", place / "profile", "--budget", "50%", "-o", place / "plan.json", "--trials", "2")
    assert found["plan"] == str(place / "plan.json")
    assert {"plan", "trial0", "uniform"} <= set(found["harm"])
    assert found["kv_bytes"]["768"]["plan"] * 2 <= found["kv_bytes"]["768"]["dense"]
    assert found["trials"] >= found["measured_plans"] >= 1
    run("export", tiny_folder, place / "plan.json", "-o", place / "model")
    return place


def test_inspect_agrees_with_the_search(place: Path) -> None:
    for path in (place, place / "model", place / "plan.json"):
        data = run("inspect", path)
        assert data["reference_length"] == 768
        assert data["kv_bytes"]["768"]["plan"] * 2 <= data["kv_bytes"]["768"]["dense"]
    assert run("inspect", place / "model")["parameters"]["plan"] > 0


def test_few_classes(place: Path, tmp_path: Path) -> None:
    out, quick = tmp_path / "two.json", ("--trials", "1", "--rounds", "0", "--moves", "0")
    found = run("search", place / "profile", "--budget", "50%", "--classes", "2", *quick, "-o", out)
    assert found["classes"]["most"] == 2
    assert found["classes"]["plan"] == run("inspect", out)["classes"] <= 2
    assert (
        {"classes", "predicted_harm", "harm"} == set(found["classes"]["limited"]) == set(found["classes"]["unlimited"])
    )
    assert "search.classes" in run("search", place / "profile", "--budget", "50%", "--classes", "0", exit_code=2)


def test_the_same_command_again_redoes_nothing(place: Path, tiny_folder: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in place.rglob("*") if file.is_file()}
    run("profile", tiny_folder, "-o", place / "profile", "--lengths", "768", *SMALL)
    run("search", place / "profile", "--budget", "50%", "-o", place / "plan.json", "--trials", "2")
    run("export", tiny_folder, place / "plan.json", "-o", place / "model")
    assert {file: file.stat().st_mtime_ns for file in place.rglob("*") if file.is_file()} == before


def test_another_run_is_not_touched_without_overwrite(place: Path, tiny_folder: Path) -> None:
    plan = Plan.load(place / "plan.json")
    plan.with_notes(quality={}).save(place / "other.json")
    message = run("export", tiny_folder, place / "other.json", "-o", place / "model", exit_code=1)
    assert "exists already and is not of this plan" in message
    message = run("eval", place / "model", "--lengths", "768", "--prompts", "2", "-o", place / "plan.json", exit_code=1)
    assert "plan.json exists already and is not an evaluation of this checkpoint" in message
    assert "--overwrite" in message
    assert Plan.load(place / "plan.json") == plan
    message = run("profile", tiny_folder, "-o", place / "profile", "--lengths", "800", exit_code=1)
    assert "--overwrite" in message
    message = run("search", place / "profile", "--budget", "60%", "-o", place / "plan.json", exit_code=1)
    assert "--overwrite" in message


def test_export_in_another_dtype(place: Path, tiny_folder: Path) -> None:
    data = run("export", tiny_folder, place / "plan.json", "-o", place / "half", "--dtype", "bfloat16")
    ours, theirs = (run("inspect", folder) for folder in (place / "half", place / "model"))
    assert (ours["dtype"], theirs["dtype"]) == ("bfloat16", "float32")
    assert data["kv_bytes"] == ours["kv_bytes"]
    plan = Plan.load(place / "half" / "plan.json")
    assert plan.budget["bytes"] == ours["kv_bytes"]
    for n, row in theirs["kv_bytes"].items():  # codes take as many bytes in any dtype
        assert plan.budget["bytes"][n] == {"dense": row["dense"] // 2, "plan": plan.kv_bytes(int(n))}
        assert row["plan"] // 2 <= plan.kv_bytes(int(n)) <= row["plan"]
    assert json.loads((place / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_eval(place: Path) -> None:
    data = run(
        "eval", place / "model", "--tasks", "needle-noise", "--lengths", "768", "--prompts", "2",
        "-o", place / "eval.json",
    )  # fmt: skip
    assert {row["model"] for row in data["results"]} >= {"dense", "uniform", "plan"}
    assert {row["metric"] for row in data["results"]} >= {"exact_match", "nll"}
    assert (place / "eval.json").is_file()


def test_a_budget_below_any_plan_says_the_smallest(place: Path) -> None:
    message = run("search", place / "profile", "--budget", "0.5%", "-o", place / "small.json", exit_code=1)
    assert "ask for at least" in message


def test_doctor_knows_both(place: Path, tiny_folder: Path) -> None:
    assert run("doctor", tiny_folder)["model"]["compressed"] is False
    found = [run("doctor", folder)["model"] for folder in (place, place / "model")]
    assert found[0] == found[1]
    assert found[0]["compressed"] is True
    assert found[0]["checkpoint"]["budget"] == ["50%"]
    assert found[0]["checkpoint"]["kv_share"]["768"] <= 0.5
    assert found[0]["checkpoint"]["loads"] is True
    text = RUNNER.invoke(app, ["doctor", str(place)])
    assert text.exit_code == 0
    assert "Everything is in order." in text.stdout
    result = RUNNER.invoke(app, ["doctor", str(place / "profile"), "--json"])
    assert result.exit_code == 1
    assert "without config.json" in json.loads(result.stdout)["model"]["problems"][0]


def test_doctor_says_what_is_damaged(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    result = RUNNER.invoke(app, ["doctor", str(tmp_path)])
    assert result.exit_code == 1
    assert f"problem: {tmp_path / 'model'} has no weights" in result.stdout
    assert result.stdout.count("loads here") == result.stdout.count("loads here  no") == 1


def test_a_compressed_model_is_no_model_to_compress(place: Path, tmp_path: Path) -> None:
    for command in (("profile", "-o", tmp_path / "p"), ("compress", "--budget", "25%", "-o", tmp_path / "out")):
        message = run(command[0], place / "model", *command[1:], exit_code=1)
        assert "is compressed already (quantization_config); give the dense model it was made from" in message


def test_a_missing_or_half_written_profile(place: Path, tmp_path: Path) -> None:
    assert "profile" in run("search", tmp_path, "--budget", "25%", "-o", tmp_path / "plan.json", exit_code=1)
    (tmp_path / "profile.json").write_text("{")
    assert "profile" in run("search", tmp_path, "--budget", "25%", "-o", tmp_path / "plan.json", exit_code=1)


def test_demo_without_its_data_says_how_to_get_it(tmp_path: Path) -> None:
    message = run("demo", "-o", tmp_path / "demo", "--data", tmp_path, exit_code=1)
    assert "make test-data" in message
