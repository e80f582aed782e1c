"""A tiny dense model, its profile of random samples, and a compressed model whose weights are off: there is much to heal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.search.conftest import random_profile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moacompress.calibration.data.samples import Sample
    from moacompress.recipe import Recipe
    from moacompress.rules.plan import Plan

LENGTHS = (128, 192)


def random_samples(source: Any, recipe: Recipe, split: str, progress: Any = None, answers: Any = None) -> list[Sample]:
    """Stands in for the data: random ids, every second sample plain text."""
    from moacompress.calibration.data.samples import Sample

    rng = np.random.default_rng([recipe.seed, split == "calibration"])
    count = recipe.calibration.samples if split == "calibration" else recipe.calibration.validation_samples
    lengths = np.sort(np.resize(recipe.calibration.lengths, count)).tolist()
    return [
        Sample(rng.integers(4, 95, n - 1), np.arange(n - 1) > n - 24, "random", n, "text" if i % 2 else "answer")
        for i, n in enumerate(lengths)
    ]


def make_healable(
    place: Path,
    dense: Path,
    tokenizer: PreTrainedTokenizerBase,
    random_plan: Callable[..., Any],
    weights: str = "keep",
    off: str = "down_proj.weight",
) -> dict[str, Path]:
    """Writes a profile and a compressed model some of whose weights are off.

    Args:
        place: where to.
        dense: folder of the dense model, or its file.
        tokenizer: of the model.
        random_plan: makes the plan.
        weights: what the dense model's are rounded to.
        off: what the names of these weights end with.

    Returns:
        The folders `dense`, `profile` and `model`.
    """
    from moacompress.models.source import load_source
    from moacompress.recipe import Recipe
    from moacompress.runtime import attach

    recipe = Recipe.from_dict(
        {
            "model": str(dense),
            "weights": weights,
            "calibration": {"lengths": LENGTHS, "samples": 32, "validation_samples": 6},
            "profile": {"draws": 1},
        }
    )
    source = load_source(dense, weights=weights)
    random_profile(source, place / "profile", recipe, random_samples)
    plan = random_plan(source.shape, 3, full_share=0.8).with_notes(provenance={"source": "dense"})
    attach(source.model, plan)
    for name, weight in source.model.named_parameters():
        if name.endswith(off):
            weight.data.mul_(0.6)
    source.model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    plan.save(place / "model" / "plan.json")
    (place / "model" / "LICENSE").write_text("Licence of the tiny model.\n")
    return {"dense": dense, "profile": place / "profile", "model": place / "model"}


def make_sharing(source: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Plan:
    """Writes a compressed model whose second layer attends as the first one does, and returns its plan."""
    from moacompress.rules.plan import Plan
    from moacompress.rules.share import Share
    from moacompress.runtime import attach
    from tests.plan_kinds import with_shares

    shares = (None, Share(0, tuple(range(source.shape.kv_heads))), *[None] * (source.shape.layers - 2))
    plan = with_shares(Plan.full(source.shape), shares)
    attach(source.model, plan)
    source.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    plan.save(folder / "plan.json")
    return plan


@pytest.fixture(scope="session")
def healable(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_folder: Path,
    tiny_tokenizer: PreTrainedTokenizerBase,
    random_plan: Callable[..., Any],
) -> dict[str, Path]:
    """Returns the folders `dense`, `profile` and `model`, a compressed one; do not write into them."""
    return make_healable(tmp_path_factory.mktemp("healable"), tiny_folder, tiny_tokenizer, random_plan)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the fresh process that loads what was written, which takes seconds."""
    monkeypatch.setattr("moacompress.healer.healing.verify_fresh", lambda folder, expected, **_: None)


@pytest.fixture(scope="session")
def small() -> Callable[..., Recipe]:
    """Returns a function that makes the recipe of a quick heal: `small(train="lora", steps=3)`."""
    from moacompress.recipe import Recipe

    def make(**flags: Any) -> Recipe:
        heal = {
            "samples": 24,
            "text_share": 0.6,
            "steps": 6,
            "batch": 576,
            "evaluations": 3,
            "train": "full",
            "lr": 1e-3,
            **flags,
        }
        return Recipe.from_dict({"heal": heal})

    return make
