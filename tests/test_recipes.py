"""Every recipe that is shipped loads, names its model and can be asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from moacompress.recipe import Recipe
from moacompress.rules.budget import Budget

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
FILES = sorted(FOLDER.rglob("*.yaml"))


def test_there_are_recipes() -> None:
    assert "smollm2-135m/demo.yaml" in [str(file.relative_to(FOLDER)) for file in FILES]


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(FOLDER)) for file in FILES])
def test_recipe(file: Path) -> None:
    from moacompress.evaluation.tasks import find_task

    recipe = Recipe.load(file)
    if file.parent.name != "effort":  # these are of any model and any budget
        assert recipe.model
        assert [Budget.parse(text) for text in recipe.budget]
    for task in recipe.evaluation.tasks:
        find_task(task)
    assert recipe.calibration.samples >= len(recipe.calibration.lengths)
    assert file.read_text("utf-8").startswith("# ")


def test_one_profile_serves_every_budget() -> None:
    recipes = [
        Recipe.load(FOLDER / "smollm2-135m" / f"{name}.yaml")
        for name in ("quarter", "eighth", "sixteenth", "thirtysecond")
    ]
    assert len({recipe.budget for recipe in recipes}) == len(recipes)
    for recipe in recipes:
        assert (recipe.calibration, recipe.profile, recipe.dtype, recipe.seed, recipe.model) == (
            (recipes[0].calibration, recipes[0].profile, recipes[0].dtype, recipes[0].seed, recipes[0].model)
        )
        assert (recipe.search.trials, recipe.search.rounds, recipe.search.moves) == (6, 0, 12)


PLANS = sorted((FOLDER.parent / "docs" / "plans").glob("*.json"))


@pytest.mark.parametrize("file", PLANS, ids=[file.name for file in PLANS])
def test_published_plan(file: Path) -> None:
    from moacompress.rules.plan import Plan

    plan = Plan.load(file)
    share = Budget.parse(*plan.budget["asked"]).share
    assert share is not None
    for length, taken in plan.budget["bytes"].items():
        assert plan.kv_bytes(int(length)) == taken["plan"] <= share * taken["dense"]
    assert not Path(plan.provenance["source"]).is_absolute()
