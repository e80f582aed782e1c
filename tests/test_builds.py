"""A build is left out just as long as it passed with the sources and tools that there are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests import builds

TEST = """
import pytest

@pytest.mark.builds("this")
def test_it():
    assert "broken" not in open({source!r}).read()
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the only source of a build, whose test is `test_it.py` beside it."""
    source = tmp_path / "source.cpp"
    source.write_text("int one;")
    (tmp_path / "test_it.py").write_text(TEST.format(source=str(source)))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = builds(of): a build\n")
    monkeypatch.setattr(builds, "ROOT", tmp_path)
    monkeypatch.setattr(builds, "FILE", tmp_path / "builds.json")
    monkeypatch.setitem(builds.BUILDS, "this", (lambda: iter([source]), ("pytest",), ()))
    return source


class Run:
    """One run of the test, as `conftest.py` makes it."""

    def __init__(self, folder: Path, *, recorded: bool = False) -> None:
        self.recorded, self.found = recorded, ""
        builds.digest.cache_clear()
        sys.modules.pop("test_it", None)
        plugins = [self, *([builds.Recorder()] if recorded else [])]
        options = f"-q -p no:cacheprovider -p no:xdist --import-mode=importlib --rootdir {folder} {folder}"
        pytest.main(options.split(), plugins)
        builds.digest.cache_clear()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        builds.leave_out(items, none=self.recorded)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.skipped:
            self.found = report.outcome


@pytest.mark.heavy
def test_what_passed_as_it_is_is_left_out(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Run(source.parent).found == "passed"
    assert not builds.FILE.exists()  # only what is asked to records
    assert Run(source.parent, recorded=True).found == "passed"
    assert Run(source.parent).found == "skipped"
    assert Run(source.parent, recorded=True).found == "passed"
    with monkeypatch.context() as other:
        other.setattr(builds, "compiler", lambda: "another compiler")
        assert Run(source.parent).found == "passed"
    assert Run(source.parent).found == "skipped"
    source.write_text("int two;")
    assert Run(source.parent).found == "passed"


def test_what_fails_is_forgotten(source: Path) -> None:
    assert Run(source.parent, recorded=True).found == "passed"
    source.write_text("broken")
    assert Run(source.parent, recorded=True).found == "failed"
    assert json.loads(builds.FILE.read_text("utf-8")) == {}
    source.write_text("int one;")
    assert Run(source.parent).found == "passed"


@pytest.mark.parametrize("of", builds.BUILDS)
def test_every_build_has_sources(of: str) -> None:
    files, *_ = builds.BUILDS[of]
    found = set(files())
    assert len(found) > 1
    assert all(path.exists() for path in found)
    assert not [path for path in found if path.suffix in (".so", ".pyc") or path.name == "__pycache__"]
