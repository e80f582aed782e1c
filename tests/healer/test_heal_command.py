"""The command `heal`: one JSON object, a table for people, and the command that resumes after Ctrl-C."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moacompress.cli import app
from moacompress.core.errors import UsageError
from moacompress.healer.heal_request import HealRequest
from moacompress.recipe import Recipe

RUNNER = CliRunner()
OPTIONS = "--train full --lr 1e-3 --steps 2 --batch 576 --samples 12 --set heal.evaluations=1"


@pytest.fixture
def command(healable: dict[str, Path], tmp_path: Path, quick: None) -> list[str]:
    (tmp_path / "run").mkdir()
    for name in ("model", "profile"):
        (tmp_path / "run" / name).symlink_to(healable[name])
    return ["heal", str(tmp_path / "run"), "-o", str(tmp_path / "out"), *OPTIONS.split()]


def test_json_then_a_table_of_the_same(command: list[str]) -> None:
    done = RUNNER.invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert (data["steps"], len(data["losses"]), data["improved"]) == (2, 2, True)
    shown = RUNNER.invoke(app, command)  # the checkpoint is there already
    assert shown.exit_code == 0, shown.stderr
    assert f"{data['held_out_kl']['after']['mean']:.4g}" in shown.stdout
    assert "of the KL" in shown.stdout


def test_after_ctrl_c_the_command_is_said(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moacompress.healer.healing.heal", stopped)
    monkeypatch.setattr(sys, "argv", ["moacompress", *command])
    done = RUNNER.invoke(app, command)
    assert done.exit_code == 130
    assert f"resume with: moacompress heal {command[1]} -o" in done.stderr


def test_another_gpu_than_the_first(command: list[str]) -> None:
    with pytest.raises(UsageError, match="cannot train on cuda:1: .* set CUDA_VISIBLE_DEVICES=1 and give cuda"):
        HealRequest.of(command[1], None, None, Recipe().override(device="cuda:1"))
