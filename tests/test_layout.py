"""The house keeps its order: imports go one way, one name is one thing, and what was importable still is."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moacompress

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def unique_names(load_script: Callable[[Path], Any]) -> Any:
    return load_script(ROOT / ".ci/unique_names.py")


def test_no_name_is_there_twice(unique_names: Any) -> None:
    assert unique_names.repeated(ROOT) == []


def test_names_that_are_there_twice_are_told(unique_names: Any, tmp_path: Path) -> None:
    files = {
        "moacompress/one/rows.py": "class Request:\n    pass\n",
        "moacompress/two/rows.py": "Row = dict[str, int]\n\n\nclass _Hidden:\n    class Request:\n        pass\n",
        "search/other.py": "from typing import TypeAlias\n\nRow: TypeAlias = list[int]\nLIMIT = 3\n",
        "calibration/__init__.py": "",
        "calibration/former/other.py": '"""Hands on."""\n\nfrom moacompress.one.rows import Request\n\n__all__ = ["Request"]\n',
        "calibration/last.py": "LIMIT = 4\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "moacompress/search").symlink_to(tmp_path / "search")
    assert unique_names.repeated(tmp_path) == [
        "module rows is there 2 times: moacompress/one/rows.py, moacompress/two/rows.py",
        "class or type Request is there 2 times: moacompress/one/rows.py:1, moacompress/two/rows.py:5",
        "class or type Row is there 2 times: moacompress/two/rows.py:1, search/other.py:3",
    ]


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


FORMER = {
    "moacompress.calibration.profile.profiler": "profile",
    "moacompress.evaluation": "evaluate",
    "moacompress.exporter": "export",
    "moacompress.pipeline": "compress",
    "moacompress.plan": "Plan",
    "moacompress.recipe": "Recipe",
    "moacompress.runtime": "attach detach",
    "moacompress.search.audit.audit": "audit",
    "moacompress.search.study": "find_plan",
}


@pytest.mark.parametrize(("module", "names"), FORMER.items())
def test_the_public_functions_are_where_they_were(module: str, names: str) -> None:
    for name in names.split():
        assert getattr(importlib.import_module(module), name) is getattr(moacompress, name)


def test_errors_are_the_same_ones_under_their_former_name() -> None:
    import moacompress.core.errors as home
    import moacompress.errors as former

    for name in former.__all__:
        assert getattr(former, name) is getattr(home, name)
    kinds = {name for name, value in vars(home).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert kinds == set(former.__all__)
