"""A plan of the tiny model with notes as a search leaves them, and its export, which the tests of exports share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moacompress.exporter.exporting import export
from moacompress.models.source import load_source
from moacompress.rules.plan import Plan


@pytest.fixture(scope="session")
def plan(tiny_folder: Path, random_plan: Callable[..., Plan]) -> Plan:
    notes: dict[str, Any] = {
        "budget": {"asked": ["40%"], "bytes": {"128": {"plan": 1, "dense": 2}}},
        "quality": {"measured_harm": {"plan": 0.01, "uniform": 0.2}, "samples": 4},
        "provenance": {"source": tiny_folder.name, "recipe": {"seed": 0}},
    }
    return random_plan(load_source(tiny_folder).shape, 3).with_notes(**notes)


@pytest.fixture(scope="session")
def exported(tiny_folder: Path, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns an exported checkpoint; do not write into it."""
    return export(tiny_folder, plan, tmp_path_factory.mktemp("export") / "model")


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """Returns a copy of an exported checkpoint."""
    return Path(shutil.copytree(exported, tmp_path / "model"))
