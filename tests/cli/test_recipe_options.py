"""Options that set a recipe's field say what the field says, and what is given reaches that field."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import click
import pytest
import typer
from typer.testing import CliRunner

from moacompress.cli import app
from moacompress.cli.harness import Command, CommandRun, Common
from moacompress.cli.recipe_options import RecipeKey, choices, collected, recipe_field, recipe_key, sentence
from moacompress.core.progress import Progress
from moacompress.recipe import Recipe

SAMPLES: dict[str, Any] = {
    "calibration.sources": ["needle"],
    "calibration.lengths": "2k",
    "evaluation.lengths": "2k",
    "heal.lengths": "2k",
    "evaluation.tasks": "needle-prose,key-value",
    "search.formats": "int4",
    "search.share": "3",
    "heal.modules": "o_proj",
    "dtype": "float16",
    "weights": "int8",
}
"""What is given, where it is no number, no choice and no text of any kind."""


def commands(group: Any = None, before: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every command with its name."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def parameters() -> Iterator[tuple[str, inspect.Parameter, RecipeKey, click.Parameter]]:
    """Yields every option of a field: command, parameter, key, and the option as it was made."""
    for name, command in commands():
        function: Any = next(cell for cell in (command.callback, command.callback.__wrapped__) if cell)
        while not isinstance(function, Command):
            function = function.__wrapped__
        made = {option.name: option for option in command.params}
        for parameter in function.__signature__.parameters.values():
            key = recipe_key(parameter)
            if key is not None:
                yield name, parameter, key, made[parameter.name]


def is_switch(option: Any) -> bool:
    """Whether an option is on or off."""
    return bool(getattr(option, "is_flag", False)) and option.name != "help"


FOUND = [*parameters()]
IDS = [f"{name} {parameter.name}" for name, parameter, _, _ in FOUND]


def test_there_are_options() -> None:
    keys = {key.key for _, _, key, _ in FOUND}
    assert {
        "search.trials",
        "profile.gates",
        "search.gates",
        "heal.rank",
        "evaluation.prompts",
        "budget",
        "seed",
    } <= keys
    names = {name for name, *_ in FOUND}
    assert {"compress", "profile", "search", "heal", "eval", "export", "data preview", "recipe init"} <= names


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, option) for name, command in commands() for option in command.params if is_switch(option)],
)
def test_every_switch_that_may_be_on_otherwise_can_be_given_off_and_says_so(name: str, option: Any) -> None:
    """A recipe or an earlier profile may say yes; a switch that is off by itself has nothing to take back."""
    fields = [key for command, parameter, key, _ in FOUND if (command, parameter.name) == (name, option.name)]
    if fields or option.default is True:
        assert option.secondary_opts == [f"--no-{option.opts[0].removeprefix('--')}"]
        shown = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "100"}).stdout
        assert f"{option.opts[0]} / {option.secondary_opts[0]}" in shown
    else:
        assert not option.secondary_opts


@pytest.mark.parametrize(("name", "parameter", "key", "option"), FOUND, ids=IDS)
def test_the_help_is_the_fields_description(
    name: str, parameter: inspect.Parameter, key: RecipeKey, option: Any
) -> None:
    field = recipe_field(key.key)
    assert field.description
    assert option.help.startswith(sentence(field))
    assert f"[recipe: {key.key}" in option.help
    if key.key not in SAMPLES or choices(field):
        for choice in choices(field):
            assert choice in option.metavar


@pytest.mark.parametrize(("name", "parameter", "key", "option"), FOUND, ids=IDS)
def test_what_is_given_reaches_the_field(name: str, parameter: inspect.Parameter, key: RecipeKey, option: Any) -> None:
    if not key.collected:
        return
    given = sample(parameter, key)
    flags = collected({parameter.name: parameter}, {parameter.name: given})
    assert list(flags) == [key.key.replace(".", "__")]
    run = CommandRun(Common(), Progress(), given=flags)
    found: Any = run.recipe() if key.key != "head_weights" else run.recipe(base=Recipe(weights="int8"))
    usual: Any = Recipe()
    for part in key.key.split("."):
        found, usual = getattr(found, part), getattr(usual, part)
    assert found != usual
    assert collected({parameter.name: parameter}, {parameter.name: None}) == {}


def sample(parameter: inspect.Parameter, key: RecipeKey) -> Any:
    """Returns something for an option that is not its default."""
    usual: Any = Recipe()
    for part in key.key.split("."):
        usual = getattr(usual, part)
    if key.key in SAMPLES:
        return SAMPLES[key.key]
    held = next(iter(get_args(parameter.annotation)))
    kinds = [kind for kind in (get_args(held) if get_origin(held) in (Union, UnionType) else (held,)) if kind]
    named = choices(recipe_field(key.key))
    if named:
        return next(choice for choice in named if choice != usual)
    if bool in kinds:
        return not usual
    if int in kinds:
        return (usual or 0) + 1
    return 0.5 if float in kinds else "some text"


def test_a_flag_wins_over_a_recipe_and_what_the_command_says_over_both(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("search: {trials: 3, rounds: 5}\n")
    run = CommandRun(Common(seed=7), Progress(), given={"search__trials": 4})
    recipe = run.recipe(file, search__moves=2)
    assert (recipe.search.trials, recipe.search.rounds, recipe.search.moves, recipe.seed) == (4, 5, 2, 7)
    assert run.recipe(file, search__trials=6).search.trials == 6
    assert run.recipe(file, search__trials=None).search.trials == 4
