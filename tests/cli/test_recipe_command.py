"""Recipes by the command line: written, read back, checked, shown, and their schema."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from moacompress.efforts import effort_recipe
from moacompress.recipe import Recipe
from moacompress.report.recipe_text import changed_settings, recipe_schema, recipe_yaml, schema_text
from tests.cli import commands

invoke = partial(commands.invoke, "recipe")
ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "docs" / "recipe.schema.json"
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.fixture(scope="module")
def check() -> Callable[[Any], None]:
    """Returns what refuses data that is not as the schema says."""
    checked: Callable[[Any], None] = jsonschema.Draft202012Validator(recipe_schema()).validate
    return checked


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_shipped_recipe(path: Path, check: Callable[[Any], None], tmp_path: Path) -> None:
    """It is read back as it is written, the schema takes it, and editors find that."""
    recipe, text = Recipe.load(path), path.read_text()
    for everything in (False, True):
        (tmp_path / "again.yaml").write_text(recipe_yaml(recipe, everything=everything))
        assert Recipe.load(tmp_path / "again.yaml") == recipe
    check(yaml.safe_load(text))
    check(yaml.safe_load((tmp_path / "again.yaml").read_text()))
    places = re.findall(r"^# yaml-language-server: \$schema=(.+)$", text, re.MULTILINE)
    assert [(path.parent / place).resolve() for place in places] == [SCHEMA]


def test_every_setting_is_there_and_explained() -> None:
    lines = [line.strip() for line in recipe_yaml(Recipe()).splitlines()]
    sections = [getattr(Recipe(), name) for name in ("calibration", "profile", "search", "evaluation", "heal")]
    keys = {key for section in (Recipe(), *sections) for key in type(section).model_fields}
    assert [key for key in keys if not any(line.startswith(f"{key}:") for line in lines)] == []
    assert sum("  # " in line for line in lines) > 45
    assert recipe_yaml(Recipe(), everything=False).strip() == ""
    assert changed_settings(Recipe(seed=1)) == {"seed": 1}


def test_init_then_validate(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    done = invoke("init", "some/model", "--budget", "12.5%", "--effort", "quick", "-o", file)
    assert done.exit_code == 0, done.output
    recipe = Recipe.load(file)
    assert recipe == effort_recipe("quick", prose=False).override(model="some/model", budget=["12.5%"])
    assert "moacompress compress --recipe" in done.output
    first = file.read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=recipe.schema.json"
    jsonschema.validate(yaml.safe_load(file.read_text()), json.loads((tmp_path / "recipe.schema.json").read_text()))
    assert invoke("init", "-o", file).exit_code == 1
    assert Recipe.load(file) == recipe
    assert invoke("init", "--max-loss", "1%", "-o", file, "--overwrite").exit_code == 0
    assert Recipe.load(file).max_loss == "1%"
    found = json.loads(invoke("validate", file, "--json").stdout)
    assert found["valid"]
    assert found["changed"]["max_loss"] == "1%"


def test_init_replaces_no_file_but_a_schema(tmp_path: Path) -> None:
    schema = tmp_path / "recipe.schema.json"
    schema.write_text(json.dumps({**recipe_schema(), "properties": {}}))  # of another version
    assert invoke("init", "-o", tmp_path / "a.yaml").exit_code == 0
    assert json.loads(schema.read_text()) == recipe_schema()
    schema.write_text('{"title": "Bread"}')
    done = invoke("init", "-o", tmp_path / "b.yaml", "--overwrite")
    assert "is not a schema of recipes" in " ".join(done.output.split())
    assert schema.read_text() == '{"title": "Bread"}'
    assert not (tmp_path / "b.yaml").exists()
    assert invoke("init", "-o", schema, "--overwrite").exit_code == 1


def test_show_reads_whatever_carries_a_recipe(tmp_path: Path) -> None:
    plan = ROOT / "docs" / "plans" / "smollm2-135m-quarter-gates.json"
    shown = yaml.safe_load(invoke("show", plan).stdout)
    assert shown["budget"] == ["25%"]
    assert "seed" not in shown
    assert yaml.safe_load(invoke("show", plan, "--all").stdout)["seed"] == 0
    recipe = Recipe(budget=("10%",), seed=3)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.resolved()))
    assert yaml.safe_load(invoke("show", tmp_path).stdout) == {"budget": ["10%"], "seed": 3}


def test_the_published_schema_is_of_this_version() -> None:
    """Written again by MOACOMPRESS_WRITE_GOLDEN=1, as recorded recipes are."""
    text = schema_text()
    if os.environ.get("MOACOMPRESS_WRITE_GOLDEN") == "1":
        SCHEMA.write_text(text)
    assert SCHEMA.read_text() == text
    assert json.loads(invoke("schema").stdout) == recipe_schema()


@pytest.mark.parametrize("data", [{"buget": "25%"}, {"search": {"trials": 0}}, {"calibration": {"samples": "many"}}])
def test_the_schema_refuses_what_recipes_do(data: dict[str, Any], check: Callable[[Any], None]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check(data)
