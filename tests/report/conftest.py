"""A finished run on a tiny model, for pages and what they are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moacompress.pipeline import compress
from moacompress.recipe import Recipe
from tests.cli.commands import answer

AUDIT = {
    "estimator": "robust",
    "samples": 7,
    "points": [{"predicted": {"robust": 0.5}, "measured": 0.4}, {"predicted": {"robust": 0.02}, "measured": 0.03}],
    "precision_points": [{"predicted": 1e-5, "measured": 2e-5}],
    "plans": [{"predicted": {"robust": 0.1}, "measured": 0.0}],
}


@pytest.fixture(scope="session")
def recipe(tiny_folder: Path, small_run: dict[str, Any]) -> Recipe:
    return Recipe.from_dict({**small_run, "model": str(tiny_folder)}).override(profile__heads=True)


@pytest.fixture(scope="session")
def run_folder(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("page") / "out"
    compress(recipe, out)
    options = "--lengths 64,128 --repeats 7 --tokens 2 --no-peak --sides plan,dense"
    answer("bench", out, *options.split(), "-o", out / "bench.json")
    fingerprint = json.loads((out / "profile" / "profile.json").read_text())["fingerprint"]
    (out / "profile" / "audit.json").write_text(json.dumps({**AUDIT, "profile": fingerprint}))
    return out
