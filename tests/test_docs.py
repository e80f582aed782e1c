"""The documentation builds without a warning, has every page, and says what there is: of Python, of variables, of packages."""

from __future__ import annotations

import ast
import fnmatch
import html
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

import moacompress
import moacompress.runtime
from moacompress.core import plugins
from tests.doc_commands import PYTHON

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Returns the site, which is built once for all workers."""
    own = tmp_path_factory.getbasetemp()
    out = (own if worker_id == "master" else own.parent) / "site"
    with FileLock(f"{out}.lock"):
        if not (out / "index.html").exists():
            command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
            done = subprocess.run([*command, ROOT / "docs", out], capture_output=True, text=True, check=False)
            if done.returncode:
                shutil.rmtree(out, ignore_errors=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_is_in_the_site_and_in_its_contents(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    assert len(pages) > 25
    for page in pages:
        assert (site / page.with_suffix(".html")).is_file()
    front = (site / "index.html").read_text("utf-8")
    assert not [
        page for page in pages if len(page.parts) == 1 and page.name != "index" and f'href="{page}.html"' not in front
    ]


def test_the_python_interface_is_described(site: Path) -> None:
    page = (site / "api.html").read_text("utf-8")
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    for name in set(moacompress.__all__) - {"__version__"}:
        assert f'id="moacompress.{name}"' in page
    for name in set(moacompress.runtime.__all__) - set(moacompress.__all__):
        assert f'id="moacompress.runtime.{name}"' in page
    assert "Measures a compressed model on held-out prompts and text" in text  # docstrings are there, not names alone


def imported(source: str) -> set[tuple[str, str]]:
    """Returns what Python code imports of moacompress: modules and names."""
    return {
        (node.module, alias.name)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "moacompress"
        for alias in node.names
    }


def described(page: str, module: str, name: str) -> bool:
    """Returns whether the page has a name, or a class that it is derived from."""
    found = getattr(importlib.import_module(module), name)
    homes = {(module, name), *((each.__module__, each.__name__) for each in getattr(found, "__mro__", ()))}
    return any(f'id="{home}.{each}"' in page for home, each in homes)


def test_what_a_page_or_an_extension_imports_is_described(site: Path) -> None:
    outside = sorted((ROOT / "tests" / "extending" / "outside").glob("*.py"))
    sources = [block for blocks in PYTHON.values() for block in blocks] + [path.read_text("utf-8") for path in outside]
    names = set().union(*map(imported, sources))
    assert {name for _, name in names} >= {"PlanCache", "keep_prefixes", "EvaluationTask", "PromptBaseline", "KVFormat"}
    page = (site / "api.html").read_text("utf-8")
    assert [f"{module}.{name}" for module, name in sorted(names) if not described(page, module, name)] == []


def test_every_variable_is_on_its_page() -> None:
    sources = [
        ROOT / "setup.py",
        *(path for top in ("moacompress", "search", "calibration") for path in (ROOT / top).rglob("*.py")),
    ]
    read = {name for path in sources for name in re.findall(r"\bMOACOMPRESS_[A-Z_]+\b", path.read_text("utf-8"))}
    told = set(
        re.findall(r"^\| `(MOACOMPRESS_\w+)`", (ROOT / "docs" / "environment.md").read_text("utf-8"), re.MULTILINE)
    )
    assert read == told
    tests = [path.read_text("utf-8") for path in (ROOT / "tests").rglob("*.py")]
    read_by_tests = {name for text in tests for name in re.findall(r"\bMOACOMPRESS_[A-Z_]+\b", text)}
    contributing = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert [name for name in sorted(read_by_tests - told) if f"`{name}" not in contributing] == []


def test_the_map_of_the_packages_is_that_of_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["id"] == "layers")
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert "```text\n" + "\n".join(layers) + "\n```" in page
    rows = "\n".join(re.findall(r"^\| (`[^|]+) \|", page, re.MULTILINE))
    named = re.findall(r"`(?:moacompress/)?(\w+)(?:/|\.py)`", rows)
    known = [name for layer in layers for name in layer.split(" | ")]
    assert [name for name in named if name in known] == known


def test_every_entry_point_is_promised_something_and_has_an_example() -> None:
    groups = [value for name, value in vars(plugins).items() if name.isupper()]
    assert len(groups) >= 5
    stability, extending = ((ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in ("stability", "extending"))
    for group in groups:
        assert f"`{group}`" in stability or f"`.{group.partition('.')[2]}`" in stability
        assert f'[project.entry-points."{group}"]' in extending


def test_a_version_has_what_a_release_needs() -> None:
    version = moacompress.__version__.split("+")[0]
    steps = (ROOT / "RELEASING.md").read_text("utf-8")
    record = ROOT / "tests" / "golden" / "recipes" / f"{version}.json"
    assert record.is_file(), f"{record.name} is missing; RELEASING.md says how it is recorded"
    targets = re.findall(r"^(test-\w+|release):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert {"test-all", "test-versions"} <= set(targets)
    assert [name for name in targets if name != "test-data" and f"make {name}" not in steps] == []


def test_every_page_is_named_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    contributing = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    pages = [path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "index.md"]
    assert [name for name in pages if f"(docs/{name}" not in readme] in ([], ["architecture.md"])
    assert "(docs/architecture.md)" in contributing  # for those who change the code


def test_what_the_architecture_names_is_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    found = re.findall(r"[\w*/]+(?:\.(?:py|h|cpp|inl)|/)(?=[\s`,;:)])", page)
    names = {name.rstrip("/") for name in found if not name.startswith("OUT/")}
    places = [str(path) for top in ("moacompress", "search", "calibration") for path in (ROOT / top).rglob("*")]
    missing = [name for name in names if not (ROOT / name).exists() and not fnmatch.filter(places, f"*/{name}")]
    assert len(names) > 50
    assert missing == []


def test_templates_and_citation_are_yaml() -> None:
    for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")):
        template = yaml.safe_load(path.read_text("utf-8"))
        assert path.name == "config.yml" or {"name", "description", "body"} <= set(template)
        for part in template.get("body", ()):
            assert part["type"] in ("input", "textarea")
            assert part["attributes"]["label"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == moacompress.__version__.split("+")[0]
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)
