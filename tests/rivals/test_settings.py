"""Which rivals are measured, and where each runs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moacompress.core.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]


def test_settings_are_chosen_by_name(rivals: SimpleNamespace) -> None:
    chosen = rivals.settings.chosen
    found = [one.full_name for one in chosen(["llamacpp:bf16-f16", "moacompress", "llamacpp"], {"mine": "folder/"})]
    assert found[:2] == ["llamacpp:bf16-f16", "moacompress:mine"]
    assert len(found) == len(set(found)) == 7
    with pytest.raises(UsageError, match="there is no rival 'kvpres'; did you mean 'kvpress'?"):
        chosen(["kvpres"], {})
    with pytest.raises(UsageError, match="there is no rival 'moacompress'"):  # no checkpoint was given
        chosen(["moacompress"], {})


def test_every_rival_has_a_runner_and_pinned_requirements(rivals: SimpleNamespace) -> None:
    names = {setting.rival for setting in rivals.settings.SETTINGS}
    assert len({setting.full_name for setting in rivals.settings.SETTINGS}) == len(rivals.settings.SETTINGS)
    for name in names:
        assert (ROOT / f"benchmarks/rivals/runners/{name}.py").is_file()
        lines = (ROOT / f"benchmarks/rivals/requirements/{name}.txt").read_text("utf-8").splitlines()
        assert lines
        assert all("==" in line or line.startswith("#") for line in lines)


def test_an_environment_is_made_once_for_its_requirements(
    rivals: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    places, commands = rivals.environments, []

    def run(command: list[str], rival: str) -> None:
        commands.append(command[1:3])
        (tmp_path / rival / "bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / rival / "bin/python").touch()

    monkeypatch.setattr(places, "_run", run)
    for _ in range(2):
        assert places.python_of("fake", tmp_path) == tmp_path / "fake/bin/python"
    assert commands == [["-m", "venv"], ["-m", "pip"]]
    (tmp_path / "fake/stale").touch()
    (rivals.requirements / "fake.txt").write_text("pytest==1\n")
    places.python_of("fake", tmp_path)
    assert len(commands) == 4
    assert not (tmp_path / "fake/stale").exists()
    assert places.python_of("moacompress", tmp_path) == Path(sys.executable)


def test_an_environment_that_cannot_be_made_says_why(
    rivals: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rivals.environments.sys, "executable", "/bin/false")
    with pytest.raises(UsageError, match="the environment of fake cannot be made"):
        rivals.environments.python_of("fake", tmp_path)
    assert not (tmp_path / "fake" / rivals.environments.MARK).exists()
