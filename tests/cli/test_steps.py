"""The commands one after another on a tiny model: each takes what the one before left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moacompress.doctor import checks
from moacompress.rules.plan import Plan
from tests.cli.commands import answer, invoke
from tests.cli.conftest import QUICK


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `doctor` ask no fresh process, which is seconds of importing; `tests/doctor` has it asked."""
    monkeypatch.setattr(checks, "_check_autoload", lambda: {"registered": True, "switch": None, "reason": None})


def test_inspect_agrees_with_the_search(place: Path) -> None:
    for path in (place, place / "model", place / "plan.json"):
        data = answer("inspect", path)
        assert data["reference_length"] == 768
        assert data["kv_bytes"]["768"]["plan"] * 2 <= data["kv_bytes"]["768"]["dense"]
    assert answer("inspect", place / "model")["parameters"]["plan"] > 0


def test_few_classes(place: Path, tmp_path: Path) -> None:
    out, quick = tmp_path / "two.json", ("--trials", "1")
    found = answer("search", place / "profile", "--budget", "50%", "--classes", "2", *quick, "-o", out)
    assert found["classes"]["most"] == 2
    assert found["classes"]["plan"] == answer("inspect", out)["classes"] <= 2
    assert (
        {"classes", "predicted_harm", "harm"} == set(found["classes"]["limited"]) == set(found["classes"]["unlimited"])
    )


def test_the_same_command_again_redoes_nothing(place: Path, tiny_folder: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in place.rglob("*") if file.is_file()}
    made = answer("profile", tiny_folder, "-o", place / "profile", *QUICK.split())
    assert (made["lengths"], made["samples"], made["layers"], made["kv_heads"]) == ([768], 2, 3, 2)
    found = answer("search", place / "profile", "--budget", "50%", "-o", place / "plan.json", "--trials", "2")
    assert found["plan"] == str(place / "plan.json")
    assert {"plan", "trial0", "uniform"} <= set(found["harm"])
    assert found["kv_bytes"]["768"]["plan"] * 2 <= found["kv_bytes"]["768"]["dense"]
    assert found["trials"] >= found["measured_plans"] >= 1
    answer("export", tiny_folder, place / "plan.json", "-o", place / "model")
    assert {file: file.stat().st_mtime_ns for file in place.rglob("*") if file.is_file()} == before


def test_export_in_another_dtype(place: Path, tiny_folder: Path, tmp_path: Path) -> None:
    data = answer("export", tiny_folder, place / "plan.json", "-o", tmp_path / "half", "--dtype", "bfloat16")
    ours, theirs = (answer("inspect", folder) for folder in (tmp_path / "half", place / "model"))
    assert (ours["dtype"], theirs["dtype"]) == ("bfloat16", "float32")
    assert data["kv_bytes"] == ours["kv_bytes"]
    plan = Plan.load(tmp_path / "half" / "plan.json")
    assert plan.budget["bytes"] == ours["kv_bytes"]
    for n, row in theirs["kv_bytes"].items():  # codes take as many bytes in any dtype
        assert plan.budget["bytes"][n] == {"dense": row["dense"] // 2, "plan": plan.kv_bytes(int(n))}
        assert row["plan"] // 2 <= plan.kv_bytes(int(n)) <= row["plan"]
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_doctor_knows_both(place: Path, tiny_folder: Path) -> None:
    assert answer("doctor", tiny_folder)["model"]["compressed"] is False
    found = [answer("doctor", folder)["model"] for folder in (place, place / "model")]
    assert found[0] == found[1]
    assert found[0]["compressed"] is True
    assert found[0]["checkpoint"]["budget"] == ["50%"]
    assert found[0]["checkpoint"]["kv_share"]["768"] <= 0.5
    assert found[0]["checkpoint"]["loads"] is True
    text = invoke("doctor", place)
    assert text.exit_code == 0
    assert "Everything is in order." in text.stdout
