"""Every recipe that is shipped loads, names its model, can be asked for, and resolves to the settings on record.

`MOACOMPRESS_WRITE_GOLDEN=1 pytest tests/test_recipes.py` records them again, for a change that is meant to change them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import moacompress
from moacompress.recipe import Recipe
from moacompress.rules.budget import Budget

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
FILES = sorted(FOLDER.rglob("*.yaml"))
NAMES = [str(file.relative_to(FOLDER)) for file in FILES]
RECORDS = FOLDER.parent / "tests" / "golden" / "recipes"
"""One file for each version: what a recipe that sets nothing resolves to, and what each recipe changes of it."""
SECTIONS = ("calibration", "profile", "search", "evaluation", "heal")


def settings(recipe: Recipe) -> dict[str, Any]:
    """Returns every setting of a recipe by its key, such as `search.trials`, as JSON has it."""
    whole = json.loads(json.dumps(recipe.resolved()))
    found = {key: value for key, value in whole.items() if key not in SECTIONS}
    return found | {f"{section}.{key}": value for section in SECTIONS for key, value in whole[section].items()}


def recipe_of(given: dict[str, Any]) -> Recipe:
    """Returns the recipe with these settings; the inverse of `settings`."""
    whole: dict[str, Any] = {key: value for key, value in given.items() if "." not in key}
    for section in SECTIONS:
        whole[section] = {key.partition(".")[2]: value for key, value in given.items() if key.startswith(f"{section}.")}
    return Recipe.from_dict(whole)


def differences(then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that are not the same, each with its value then and now."""
    missing = "no such key"
    both = {key: (then.get(key, missing), now.get(key, missing)) for key in sorted({**then, **now})}
    return {key: values for key, values in both.items() if values[0] != values[1]}


def on_record(file: Path) -> dict[str, dict[str, Any]]:
    """Returns all settings of every recipe in a record; "" is the recipe that sets nothing."""
    held: dict[str, dict[str, Any]] = json.loads(file.read_text("utf-8"))
    return {name: held[""] | changed for name, changed in held.items()}


@pytest.fixture(scope="module")
def record() -> dict[str, dict[str, Any]]:
    """What this version has on record."""
    file = RECORDS / f"{moacompress.__version__}.json"
    if os.environ.get("MOACOMPRESS_WRITE_GOLDEN") == "1":
        default = settings(Recipe())
        found = {name: settings(Recipe.load(path)) for name, path in zip(NAMES, FILES, strict=True)}
        changed = {
            name: {key: now for key, (_, now) in differences(default, own).items()} for name, own in found.items()
        }
        rows = [f"{json.dumps(name)}: {json.dumps(own)}" for name, own in {"": default, **changed}.items()]
        file.write_text("{\n" + ",\n".join(rows) + "\n}\n", "utf-8")
    return on_record(file)


def test_there_are_recipes() -> None:
    assert "smollm2-135m/demo.yaml" in NAMES


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_recipe(file: Path) -> None:
    from moacompress.evaluation.tasks.registry import find_task

    recipe = Recipe.load(file)
    if file.parent.name != "effort":  # these are of any model and any budget
        assert recipe.model
        assert [Budget.parse(text) for text in recipe.budget]
    for task in recipe.evaluation.tasks:
        find_task(task)
    assert recipe.calibration.samples >= len(recipe.calibration.lengths)
    assert file.read_text("utf-8").startswith("# ")


@pytest.mark.parametrize("name", ["", *NAMES])
def test_settings_are_those_on_record(name: str, record: dict[str, dict[str, Any]]) -> None:
    """A default that changed, or a recipe, is named here, with its value on record and now."""
    assert differences(record.get(name, {}), settings(Recipe.load(FOLDER / name) if name else Recipe())) == {}
    assert set(record) == {"", *NAMES}


@pytest.mark.parametrize("file", sorted(RECORDS.glob("*.json")), ids=lambda file: file.stem)
def test_resolved_recipes_of_every_version_mean_what_they_meant(file: Path) -> None:
    """Artefacts of that version carry these settings, and say today what they said then, whatever the defaults are."""
    for name, then in on_record(file).items():
        now = settings(recipe_of(then))
        assert differences(then, {key: now.get(key) for key in then}) == {}, name


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
    budget = Budget.parse(*plan.budget["asked"])
    assert budget.share is not None
    for length, taken in plan.budget["bytes"].items():
        assert plan.kv_bytes(int(length)) == taken["plan"]
        assert taken["plan"] <= budget.share * taken["dense"] or budget.length not in (None, int(length))
    assert budget.length is None or str(budget.length) in plan.budget["bytes"]
    assert not Path(plan.provenance["source"]).is_absolute()
