"""Options that set a recipe's field: their names, texts, choices and defaults are the field's.

A command that takes one hands it on without a word: `CommandRun.recipe` reads what was given by the keys here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from moacompress.recipe import Recipe

_ATTRIBUTE = "recipe_key"


class RecipeKey(NamedTuple):
    """What of a recipe an option sets.

    Attributes:
        key: dotted, such as `search.trials`.
        read: makes what a recipe takes of what is given; None leaves it.
        collected: whether `CommandRun.recipe` takes it by itself; the command has more to say of the others.
    """

    key: str
    read: Callable[[Any], Any] | None
    collected: bool


def recipe_field(key: str) -> FieldInfo:
    """Returns a field of the recipe by its dotted key."""
    *sections, name = key.split(".")
    found: Any = Recipe
    for section in sections:
        found = type(found.model_fields[section].get_default())
    field: FieldInfo = found.model_fields[name]
    return field


def recipe_option(
    key: str,
    *flags: str,
    metavar: str | None = None,
    more: str = "",
    read: Callable[[Any], Any] | None = None,
    collected: bool = True,
    states_default: bool = True,
    **settings: Any,
) -> Any:
    """Returns the option that sets a field of the recipe.

    Args:
        key: of the field, dotted.
        *flags: its names, where they are not the field's with dashes; a switch has `--no-` too.
        metavar: what stands for the value; by default the field's choices, where it has some.
        more: said behind the field's description.
        read: see `RecipeKey`.
        collected: likewise.
        states_default: whether the help says the recipe's own default; not where a command begins with another recipe.
        **settings: of `typer.Option`.
    """
    field = recipe_field(key)
    name = key.rpartition(".")[2].replace("_", "-")
    # a recipe may say either, so a command line can too
    names = flags or (
        f"--{name}/--no-{name}" if bool in (field.annotation, *get_args(field.annotation)) else f"--{name}",
    )
    shown = metavar or ("|".join(choices(field)) or None)
    usual = _shown(field.get_default()) if states_default else ""
    where = f"[recipe: {key}{f' = {usual}' if usual else ''}]"
    text = " ".join(part for part in (sentence(field), more, where) if part)
    option: Any = typer.Option(*names, metavar=shown, help=text, show_default=False, **settings)
    setattr(option, _ATTRIBUTE, RecipeKey(key, read, collected))
    return option


def sentence(field: FieldInfo) -> str:
    """Returns the description of a field as a sentence."""
    text = field.description or ""
    return f"{text[:1].upper()}{text[1:]}."


def choices(field: FieldInfo) -> tuple[str, ...]:
    """Returns the texts that a field may be; none where it is something else than one of a few."""

    def of(annotation: Any) -> tuple[str, ...]:
        if get_origin(annotation) is Annotated:
            return of(get_args(annotation)[0])
        if get_origin(annotation) is Literal:
            return tuple(map(str, get_args(annotation)))
        if get_origin(annotation) in (Union, UnionType):
            return tuple(text for part in get_args(annotation) for text in of(part))
        return ()

    return of(field.annotation)


def recipe_key(parameter: Parameter) -> RecipeKey | None:
    """Returns what of a recipe a command's parameter sets, or None."""
    held = getattr(parameter.annotation, "__metadata__", ())
    return next((found for item in held if (found := getattr(item, _ATTRIBUTE, None)) is not None), None)


def collected(parameters: Mapping[str, Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a recipe is overridden with, as `Recipe.override` takes it.

    Args:
        parameters: of the command.
        given: their values by name; None was not given.
    """
    found = {}
    for name, parameter in parameters.items():
        key = recipe_key(parameter)
        if key is not None and key.collected and given.get(name) is not None:
            value = given[name]
            found[key.key.replace(".", "__")] = value if key.read is None else key.read(value)
    return found


def _shown(value: Any) -> str:
    """Returns a default as a person gives it; empty where there is none to say."""
    if value is None or isinstance(value, bool) or value == ():
        return ""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
