"""The documentation builds without a warning, has every page, and says of the Python interface what there is."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import moacompress

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "--fail-on-warning",
        "--keep-going",
        "--quiet",
        str(ROOT / "docs"),
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
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
    text = html.unescape(re.sub(r"<[^>]+>", "", (site / "api.html").read_text("utf-8")))
    for name in set(moacompress.__all__) - {"__version__"}:
        assert f"moacompress.{name}" in text
    assert "Measures a compressed model on held-out prompts and text" in text  # docstrings are there, not names alone


def test_every_page_is_named_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    pages = [path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "index.md"]
    assert [name for name in pages if f"(docs/{name}" not in readme] == []


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
