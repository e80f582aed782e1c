"""A profile, a plan and a checkpoint as the commands leave them, which tests of later commands begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.commands import answer

QUICK = "--samples 2 --validation-samples 2 --set profile.draws=1 --source needle --seed 3 --lengths 768"


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Returns a run's folder with a profile, a plan and an exported model; do not write into it."""
    place = tmp_path_factory.mktemp("steps") / "OUT"
    answer("profile", tiny_folder, "-o", place / "profile", *QUICK.split())
    answer("search", place / "profile", "--budget", "50%", "-o", place / "plan.json", "--trials", "2")
    answer("export", tiny_folder, place / "plan.json", "-o", place / "model")
    return place
