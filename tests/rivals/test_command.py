"""The command: what it refuses before anything starts, and what it prints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.rivals.conftest import BENCHMARKS


@pytest.fixture
def command(rivals: SimpleNamespace, load_script: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    script = load_script(BENCHMARKS / "compare_rivals.py")

    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["compare_rivals.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            script.main()
        return ended.value.code if ended.value.code is not None else 0  # type: ignore[return-value]

    return SimpleNamespace(run=run, script=script)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--rivals", "transformers"], "the dense model and a file of rows"),
        (["model/", "-o", "rows.jsonl", "--measure", "taste"], "--measure takes quality, speed, kept"),
        (["model/", "-o", "rows.jsonl", "--questions", "never"], "--questions seen and unseen"),
        (["model/", "-o", "rows.jsonl", "--ours", "folder"], "--ours takes NAME=FOLDER"),
    ],
)
def test_refusals(command: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str) -> None:
    assert command.run(*arguments) == 2
    assert why in capsys.readouterr().err


def test_an_unknown_rival_is_refused(command: Any) -> None:
    assert "did you mean 'llamacpp'?" in command.run("model/", "-o", "rows.jsonl", "--rivals", "llamacp")


def test_a_run_of_the_fake_rival(
    command: Any, rivals: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    fake = rivals.settings.Setting("transformers", "dense", {"says": [9, 2]})
    for module in (command.script, rivals.measures):
        monkeypatch.setattr(module, "chosen", lambda names, ours: [fake])
    out = str(tmp_path / "rows.jsonl")
    options = [
        *["--tasks", "needle-noise", "--lengths", "900", "--prompts", "1", "--steps", "2", "--turns", "1", "-o"],
        out,
    ]
    assert command.run(str(tiny_folder), *options) == 0
    said = capsys.readouterr()
    assert "| transformers | dense | 1 |" in said.out
    assert "needle-noise" in said.err
    assert command.run(str(tiny_folder), *options) == 0
    assert capsys.readouterr().err == ""
