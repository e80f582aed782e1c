"""Options that set a recipe's field say what the field says, and what is given reaches that field."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_args

import click
import pytest

from moacompress.cli.harness import Command, CommandRun
from moacompress.cli.options import Common, read_sources
from moacompress.cli.recipe_options import (
    choices,
    read_options,
    read_settings,
    recipe_field,
    recipe_parameter,
    sentence,
)
from moacompress.core.progress import Progress
from moacompress.recipe import Recipe
from tests.cli.commands import all_commands, invoke

SAMPLES: dict[str, Any] = {
    "budget": ["25%"],
    "max_loss": "1%",
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


def options() -> Iterator[tuple[str, str, click.Parameter]]:
    """Yields every option of a field: command, key, and the option as it was made."""
    for name, command in all_commands():
        function: Any = next(cell for cell in (command.callback, command.callback.__wrapped__) if cell)
        while not isinstance(function, Command):
            function = function.__wrapped__
        made = {option.name: option for option in command.params}
        for parameter, key in function.keys.items():
            yield name, key, made[parameter]


def is_switch(option: Any) -> bool:
    """Whether an option is on or off."""
    return bool(getattr(option, "is_flag", False)) and option.name != "help"


FOUND = [*options()]


def test_there_are_options() -> None:
    keys = {key for _, key, _ in FOUND}
    assert {"search.trials", "profile.gates", "search.gates", "heal.lr", "evaluation.prompts", "budget", "seed"} <= keys
    names = {name for name, *_ in FOUND}
    assert {"compress", "profile", "search", "heal", "eval", "export", "data preview", "recipe init"} <= names


@pytest.mark.parametrize(("name", "command"), [*all_commands()])
def test_every_switch_that_may_be_on_otherwise_can_be_given_off_and_says_so(name: str, command: Any) -> None:
    """A recipe or an earlier profile may say yes; a switch that is off by itself has nothing to take back."""
    fields = {option.name for each, _, option in FOUND if each == name}
    shown = invoke(*name.split(), "--help", env={"COLUMNS": "100"}).stdout
    for option in filter(is_switch, command.params):
        if option.name in fields or option.default is True:
            assert option.secondary_opts == [f"--no-{option.opts[0].removeprefix('--')}"]
            assert f"{option.opts[0]} / {option.secondary_opts[0]}" in shown
        else:
            assert not option.secondary_opts


@pytest.mark.parametrize("name", sorted({name for name, *_ in FOUND}))
def test_the_help_is_the_fields_description(name: str) -> None:
    for _, key, option in (each for each in FOUND if each[0] == name):
        field, shown = recipe_field(key), cast(Any, option)
        assert field.description
        assert shown.help.startswith(sentence(field))
        assert f"[recipe: {key}" in shown.help
        for choice in choices(field):
            assert choice in shown.metavar


@pytest.mark.parametrize("key", sorted({key for _, key, _ in FOUND}))
def test_what_is_given_reaches_the_field(key: str) -> None:
    name = recipe_parameter(key).name
    flags = read_options({name: key}, {name: sample(key)})
    assert list(flags) == [key.replace(".", "__")]
    run = CommandRun(Common(), Progress(), given=flags)
    found: Any = run.recipe() if key != "head_weights" else run.recipe(Recipe(weights="int8"))
    usual: Any = Recipe()
    for part in key.split("."):
        found, usual = getattr(found, part), getattr(usual, part)
    assert found != usual
    assert read_options({name: key}, {name: None}) == {}


def sample(key: str) -> Any:
    """Returns something for an option that is not its default."""
    usual: Any = Recipe()
    for part in key.split("."):
        usual = getattr(usual, part)
    if key in SAMPLES:
        return SAMPLES[key]
    kinds = get_args(recipe_parameter(key).annotation)
    named = choices(recipe_field(key))
    if named:
        return next(choice for choice in named if choice != usual)
    if bool in kinds:
        return not usual
    if int in kinds:
        return (usual or 0) + 1
    return 0.5 if float in kinds else "some text"


def test_an_option_wins_over_a_recipe_and_what_the_command_says_over_both(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("search: {trials: 3, classes: 5}\n")
    run = CommandRun(Common(recipe=file), Progress(), given={"search__trials": 4, "seed": 7})
    recipe = run.recipe(search__timeout=2)
    assert (recipe.search.trials, recipe.search.classes, recipe.search.timeout, recipe.seed) == (4, 5, 2, 7)
    assert run.recipe(search__trials=6).search.trials == 6
    assert run.recipe(search__trials=None).search.trials == 4


def test_any_key_can_be_set() -> None:
    given = read_settings(
        ["search.trials=3", " heal.lr =2e-5", "search.share=layers=12:11", "search.floors={3: 0.5}", "budget=25%"]
    )
    recipe = CommandRun(Common(), Progress(), given=given).recipe()
    assert (recipe.search.trials, recipe.heal.lr, recipe.search.share) == (3, 2e-5, "layers=12:11")
    assert (recipe.search.floors, recipe.budget) == ({3: 0.5}, ("25%",))
    assert given["budget"] == ["25%"]


def test_sources(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    wanted = {
        "key-value": {"generator": "key-value"},
        "multi-needle-prose": {"generator": "multi-needle", "haystack": "prose"},
        "needle-prose-uuids": {"generator": "needle", "haystack": "prose", "values": "uuids"},
        "records-codes": {"generator": "records", "values": "codes"},
        "qa.jsonl": {"path": "qa.jsonl"},
        str(tmp_path / "texts"): {"path": str(tmp_path / "texts")},
        "some/set": {"dataset": "some/set"},
    }
    sources = read_sources([*wanted])
    assert sources == [*wanted.values()]
    assert len(Recipe().override(calibration__sources=sources).calibration.sources) == len(wanted)
