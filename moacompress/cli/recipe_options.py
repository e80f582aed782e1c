"""Options made from the recipe's fields: their names, types, texts, choices and defaults are the field's.

A command names the keys that it has options for; `CommandRun.recipe` sets what was given. Any other key is set with `--set`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from moacompress.cli.options import read_sources
from moacompress.core.errors import UsageError
from moacompress.recipe import Recipe


@dataclass(frozen=True)
class Spelling:
    """How a key is given on a command line, where the field does not say it."""

    flag: str = ""  # its name, where it is not the field's with dashes
    metavar: str | None = None
    more: str = ""  # said behind the field's description
    repeatable: bool = False
    read: Callable[[Any], Any] | None = None  # makes what a recipe takes of what is given
    envvar: str | None = None  # environment variable that does the same


SPELLINGS = {
    "budget": Spelling(
        metavar="BUDGET",
        more="Repeatable; for `search`, a comma-separated list gives one plan per budget.",
        repeatable=True,
    ),
    "max_loss": Spelling(metavar="LOSS"),
    "device": Spelling(metavar="DEVICE"),
    "calibration.sources": Spelling("--source", "NAME", "Repeatable.", repeatable=True, read=read_sources),
    "calibration.text": Spelling(metavar="PATH"),
    "profile.scorer": Spelling(metavar="NAME"),
    "search.share": Spelling(metavar="WHICH"),
    "search.storage": Spelling(metavar="STORAGE", envvar="MOACOMPRESS_STORAGE"),
    "evaluation.tasks": Spelling(
        more="Names such as needle-noise; ruler or all for groups; text for long text.",
    ),
}


def recipe_field(key: str) -> FieldInfo:
    """Returns a field of the recipe by its dotted key."""
    *sections, name = key.split(".")
    found: Any = Recipe
    for section in sections:
        found = type(found.model_fields[section].get_default())
    field: FieldInfo = found.model_fields[name]
    return field


def recipe_parameter(key: str, *, states_default: bool = True) -> Parameter:
    """Returns the option that sets a field of the recipe, as a parameter of a command that is None where it is not given.

    `states_default`: whether the help says the recipe's default; not where a command begins with another recipe.
    """
    field, spelling = recipe_field(key), _spelling(key)
    flag = spelling.flag or f"--{key.rpartition('.')[2].replace('_', '-')}"
    types = _alternatives(field.annotation)
    kind: type = next((each for each in (bool, int, float) if each in types), str)
    is_list = any(get_origin(each) is tuple for each in types)
    default = _shown(field.get_default()) if states_default else ""
    where = f"[recipe: {key}{f' = {default}' if default else ''}]"
    option: Any = typer.Option(
        None,
        f"{flag}/--no-{flag.removeprefix('--')}" if kind is bool else flag,  # a recipe may say either
        metavar=spelling.metavar or "|".join(choices(field)) or ("LIST" if is_list else None),
        help=" ".join(part for part in (sentence(field), spelling.more, where) if part),
        show_default=False,
        envvar=spelling.envvar,
    )
    name = flag.removeprefix("--").replace("-", "_")
    value: Any = list[str] if spelling.repeatable else kind
    return Parameter(name, Parameter.KEYWORD_ONLY, default=option, annotation=value | None)


def read_options(keys: Mapping[str, str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a recipe is overridden with, of `keys` and values by the names of options; None was not given."""
    found = {}
    for name, key in keys.items():
        value = given[name]
        if value is not None and value != []:
            read = _spelling(key).read
            found[key.replace(".", "__")] = value if read is None else read(value)
    return found


def read_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Returns what a recipe is overridden with by `--set KEY=VALUE`; a value is read as in a recipe's file.

    Raises:
        UsageError: one that is not of this form.
    """
    import yaml

    found = {}
    for text in texts:
        key, _, value = text.partition("=")
        key = key.strip()
        try:
            read = yaml.safe_load(value)
            if not key or read is None:
                raise ValueError("it needs a key and a value")
        except (ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"--set {text!r} is not KEY=VALUE, such as search.trials=1: {reason}") from error
        spelling = _spelling(key)
        if spelling.repeatable and not isinstance(read, list):
            read = [read]
        if spelling.read is not None and all(isinstance(one, str) for one in read):
            read = spelling.read(read)
        found[key.replace(".", "__")] = read
    return found


def sentence(field: FieldInfo) -> str:
    """Returns the description of a field as a sentence."""
    text = field.description or ""
    return f"{text[:1].upper()}{text[1:]}."


def choices(field: FieldInfo) -> tuple[str, ...]:
    """Returns the texts that a field may be; none where it is something else than one of a few."""
    literals = (each for each in _alternatives(field.annotation) if get_origin(each) is Literal)
    return tuple(str(text) for each in literals for text in get_args(each))


def _spelling(key: str) -> Spelling:
    return SPELLINGS.get(key, Spelling())


def _alternatives(annotation: Any) -> list[Any]:
    """Returns the types that a value may have, without what is `Annotated` to them."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [found for part in get_args(annotation) for found in _alternatives(part)]
    return [annotation]


def _shown(value: Any) -> str:
    """Returns a default as a person gives it; empty where there is none to say."""
    if value is None or isinstance(value, bool) or value == ():
        return ""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
