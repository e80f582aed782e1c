"""A tiny dense model, its profile of random samples, and an export of a sparse plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moacompress.calibration.profiler import profile
from moacompress.calibration.samples import Sample
from moacompress.exporter.exporting import export
from moacompress.models.source import load_source
from moacompress.recipe import Recipe

LENGTHS = (128, 192)


def random_samples(source: Any, recipe: Recipe, split: str, progress: Any = None, answers: Any = None) -> list[Sample]:
    """Stands in for the data: random ids, every fourth sample plain text."""
    rng = np.random.default_rng([recipe.seed, split == "calibration"])
    count = recipe.calibration.samples if split == "calibration" else recipe.calibration.validation_samples
    lengths = np.sort(np.resize(recipe.calibration.lengths, count)).tolist()
    return [
        Sample(rng.integers(4, 95, n - 1), np.arange(n - 1) > n - 24, "random", n, "text" if i % 4 == 3 else "answer")
        for i, n in enumerate(lengths)
    ]


@pytest.fixture(scope="session")
def healable(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, random_plan: Callable[..., Any]
) -> dict[str, Path]:
    """Returns the folders `dense`, `profile` and `model`, a compressed one; do not write into them."""
    place = tmp_path_factory.mktemp("healable")
    recipe = Recipe.from_dict(
        {
            "model": str(tiny_folder),
            "calibration": {"lengths": LENGTHS, "samples": 12, "validation_samples": 6},
            "profile": {"draws": 1},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moacompress.calibration.sample_sources.build_samples", random_samples)
        profile(tiny_folder, place / "profile", recipe)
    plan = random_plan(load_source(tiny_folder).shape, 3, full_share=0.0, formats=True)
    export(tiny_folder, plan.with_notes(provenance={"source": "dense"}), place / "model")
    return {"dense": tiny_folder, "profile": place / "profile", "model": place / "model"}


@pytest.fixture(scope="session")
def small() -> Callable[..., Recipe]:
    """Returns a function that makes the recipe of a quick heal: `small(train="full", steps=3)`."""

    def make(**flags: Any) -> Recipe:
        heal = {"samples": 12, "steps": 6, "batch": 384, "evaluations": 3, "train": "full", "lr": 1e-3, **flags}
        return Recipe.from_dict({"heal": heal})

    return make
