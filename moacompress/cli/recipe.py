"""`moacompress recipe`: writes, checks and shows recipes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from moacompress.cli.harness import CommandRun, Output, command, group
from moacompress.cli.options import ModelArgument
from moacompress.core.artefact_names import MANIFEST_FILE, RECIPE_FILE
from moacompress.core.errors import ArtefactError, RecipeError
from moacompress.core.files import read_json, write_text
from moacompress.efforts import Effort, effort_recipe
from moacompress.recipe import Recipe

SCHEMA_FILE = "recipe.schema.json"


@command(
    "moacompress recipe init path/to/model --budget 25% -o recipe.yaml",
    "moacompress recipe init --effort thorough --text prose/ -o recipe.yaml",
    settings=("budget", "max_loss", "calibration.text", "seed", "device", "dtype"),
    takes=("settings", "overwrite"),
    states_defaults=False,
)
def init(
    run: CommandRun,
    model: ModelArgument = None,
    effort: Annotated[
        Effort, typer.Option("--effort", help="Settings to start from: quick, standard or thorough.")
    ] = "standard",
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="File to write the recipe to.")] = Path(
        "recipe.yaml"
    ),
) -> Output:
    """Write a recipe with every setting and a comment on each, and the JSON schema for editors beside it."""
    from moacompress.report.recipe_text import SCHEMA_LINE, recipe_yaml, schema_text

    if out.exists() and not run.common.overwrite:
        raise ArtefactError(f"{out} exists already; choose another file or pass --overwrite")
    beside = out.with_name(SCHEMA_FILE)
    _check_schema(beside, out)
    prose = run.given.get("calibration__text") is not None
    recipe = run.recipe(effort_recipe(effort, prose=prose), model=model)
    write_text(beside, schema_text())
    write_text(out, SCHEMA_LINE.format(place=SCHEMA_FILE) + recipe_yaml(recipe))
    next_step = shlex.join(["moacompress", "compress", "--recipe", str(out), "-o", "runs/mine"])
    return Output(
        {"recipe": str(out), "schema": str(beside), "settings": recipe.resolved()},
        [f"The recipe is {out}; editors complete it with {beside}", f"Next: {next_step}"],
    )


@command(
    "moacompress recipe validate recipe.yaml",
    "moacompress recipe validate recipe.yaml --text prose/ --json",
    settings=("calibration.text",),
)
def validate(
    run: CommandRun,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Recipe, YAML or JSON.")],
) -> Output:
    """Check a recipe without a model: keys, values, tasks, and the data files that it names."""
    from moacompress.report.recipe_text import changed_settings
    from moacompress.run_checks import check_recipe

    recipe = run.recipe(file=path)
    check_recipe(recipe)
    changed = changed_settings(recipe)
    return Output(
        {"recipe": str(path), "valid": True, "changed": changed},
        [f"{path} is valid; {len(changed)} settings differ from the defaults."],
    )


@command(
    "moacompress recipe show recipe.yaml",
    "moacompress recipe show runs/mine --all",
    "moacompress recipe show plan.json",
)
def show(
    run: CommandRun,
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Recipe, the folder of a run, a profile, or a plan file.")
    ],
    everything: Annotated[bool, typer.Option("--all", help="Also show settings that have their default.")] = False,
) -> Output:
    """Show the settings of a recipe, or those of a run, a profile or a plan."""
    from moacompress.report.recipe_text import recipe_yaml

    recipe = _recipe_at(path)
    text = recipe_yaml(recipe, everything=everything)
    return Output({"settings": recipe.resolved()}, [text.rstrip() or "every setting has its default"])


@command("moacompress recipe schema > recipe.schema.json")
def schema(run: CommandRun) -> Output:
    """Print the JSON schema of recipes, for completion and checks in editors."""
    from moacompress.report.recipe_text import recipe_schema, schema_text

    return Output(recipe_schema(), [schema_text().rstrip()])


def _check_schema(beside: Path, out: Path) -> None:
    """Refuses a place for the schema of recipes that holds something else.

    Raises:
        ArtefactError: says what.
    """
    from moacompress.report.recipe_text import SCHEMA_TITLE

    if out == beside:
        raise ArtefactError(
            f"{SCHEMA_FILE} is the name of the schema; give the recipe another name, such as recipe.yaml"
        )
    if beside.exists():
        found = read_json(beside, "schema")
        if not isinstance(found, dict) or found.get("title") != SCHEMA_TITLE:
            raise ArtefactError(f"{beside} exists and is not a schema of recipes; choose another folder")


def _recipe_at(path: Path) -> Recipe:

    if path.is_dir():
        if (path / RECIPE_FILE).is_file():
            return Recipe.load(path / RECIPE_FILE)
        if (path / MANIFEST_FILE).is_file():
            return _within(read_json(path / MANIFEST_FILE, "profile"), ("recipe",), path)
        raise ArtefactError(
            f"{path} holds no {RECIPE_FILE}; name a recipe, the folder of a run, a profile, or a plan's file"
        )
    if path.suffix == ".json":
        found = read_json(path, "recipe or plan")
        if isinstance(found, dict) and found.get("format") == "moacompress-plan":
            return _within(found, ("provenance", "recipe"), path)
    return Recipe.load(path)


def _within(found: Any, keys: tuple[str, ...], path: Path) -> Recipe:

    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    if found is None:
        raise RecipeError(f"{path} does not say which recipe it was made with")
    return Recipe.from_dict(found, f"recipe of {path}")


app = group("Write, check and show recipes.", {"init": init, "validate": validate, "show": show, "schema": schema})
