"""`moacompress profile` and its flags: the audit, and what a dry run says."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moacompress.calibration.profile.store import Profile
from moacompress.core.artefact_names import ROUNDING_FILE, of_profile
from tests.cli import commands

invoke = partial(commands.invoke, "profile")
answer = partial(commands.answer, "profile")
problem = partial(commands.problem, "profile")
SMALL = (
    "--lengths", "768", "--samples", "4", "--validation-samples", "2", "--source", "needle", "--seed", "3",
    "--set", "profile.draws=1",
)  # fmt: skip
AUDIT = ("--audit", "9", "--set", "budget=50%")


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the folder of a profile that was audited later, which adds the baselines, and what `--json` said."""
    out = tmp_path_factory.mktemp("audited") / "profile"
    plain = answer(tiny_folder, "-o", out, *SMALL, "--gates")
    assert "audit" not in plain
    assert "moa" not in plain["estimators"]
    return out, answer(tiny_folder, "-o", out, *SMALL, *AUDIT, "--gates")


def test_audit_profiles_the_baselines_and_compares_them(audited: tuple[Path, dict[str, Any]]) -> None:
    out, data = audited
    assert data["samples"] == 4
    assert data["audit_samples"] == 2
    assert {"robust", "moa", "mass"} == set(data["audit"]) == set(data["audit_plans"]) == set(data["estimators"])
    assert set(data["audit"]) == set(Profile.load(out).estimators)
    assert {"spearman", "ci95", "ratio", "n"} <= set(data["audit"]["robust"])
    assert {"spearman", "ci95", "ratio", "regret", "n"} <= set(data["audit_plans"]["robust"])
    assert set(data["chosen_minus_moa"]) == {"value", "ci95"}
    assert (len(data["points"]), data["audit"]["moa"]["n"]) == (9, 9)
    stored = json.loads((out / "audit.json").read_text())
    assert all(stored[name] == data[name] for name in ("audit", "audit_plans", "points", "plans", "split_half"))
    assert (out / "audit.html").is_file()
    left = {path.name for path in out.iterdir()}
    assert left == {path.name for path in of_profile(out)} - {ROUNDING_FILE}  # no weights were rounded


def test_the_same_command_again_shows_the_tables(audited: tuple[Path, dict[str, Any]], tiny_folder: Path) -> None:
    out, data = audited
    assert data["gates"]["samples"] == 24  # of their own
    assert [row["share"] for row in data["gates"]["left"]] == [0.03, 0.06, 0.12, 0.25]
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    result = invoke(tiny_folder, "-o", out, *SMALL, *AUDIT, "--gates")
    assert result.exit_code == 0, result.stderr
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()} == before
    lines = result.stdout.splitlines()
    assert any("Influence of tokens 32 and more behind" in line for line in lines)
    assert any(line.split()[:2] == ["25%", f"{data['gates']['left'][-1]['gate'][0]:.2f}"] for line in lines)
    assert "9 ablations of one KV head on 2 held-out samples" in result.stdout
    assert "Spearman of robust minus that of moa" in result.stdout
    assert all(name in result.stdout for name in data["audit"])
    message = problem(tiny_folder, "-o", out, *SMALL, "--audit", "8", "--gates", "--set", "budget=50%")
    assert "audit.json holds the audit of another request" in message
    assert "--overwrite" in message


def test_a_dry_run_profiles_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    assert answer(tiny_folder, "-o", tmp_path / "profile", *SMALL, "--dry-run")["seconds"] > 0
    assert not (tmp_path / "profile").exists()


def test_more_of_a_profile_needs_no_option_again(
    audited: tuple[Path, dict[str, Any]], tiny_folder: Path, tmp_path: Path
) -> None:
    """The command that a report names: what the profile was made with is in it."""
    out = tmp_path / "profile"
    shutil.copytree(audited[0], out)
    result = invoke(tiny_folder, "-o", out, "--heads")
    assert result.exit_code == 0, result.stderr
    assert "distance" in Profile.load(out).statistics.arrays
    assert "holds a profile of another model or recipe" in problem(tiny_folder, "-o", out, "--lengths", "700")


def test_what_failed_before_its_first_sample_says_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    """The corrected command is not held to the mistake."""
    out, bad = tmp_path / "profile", tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    options = ("--lengths", "700", "--samples", "4", "--validation-samples", "2", "--set", "profile.draws=1")
    assert "bad.jsonl" in problem(tiny_folder, "-o", out, "--source", bad, *options)
    assert invoke(tiny_folder, "-o", out, *options).exit_code == 0
    assert all(source.generator for source in Profile.load(out).recipe.calibration.sources)
