"""Recipes as people read and write them: YAML in which every key says what it is for, and the schema for editors."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from moacompress.recipe import Recipe

SCHEMA_ID = "https://json-schema.org/draft/2020-12/schema"
SCHEMA_TITLE = "moacompress recipe"
SCHEMA_LINE = "# yaml-language-server: $schema={place}\n"
"""A line of a YAML file by which editors find its schema, at a place relative to the file."""
WIDTH = 10_000
"""Of a value in YAML: it stays on its line."""
LINE = 128
"""Columns that a line with its comment may take; a longer comment stands above its key."""


def recipe_yaml(recipe: Recipe, *, everything: bool = True) -> str:
    """Returns a recipe as YAML with a comment on each key, which `Recipe.load` reads back; or only of what is changed."""
    return "\n".join(_lines(recipe, Recipe(), everything, "")) + "\n"


def changed_settings(recipe: Recipe) -> dict[str, Any]:
    """Returns the settings that are not the defaults, by their dotted keys."""
    defaults = dict(_flat(Recipe().resolved(), ""))
    return {key: value for key, value in _flat(recipe.resolved(), "") if value != defaults.get(key)}


def recipe_schema() -> dict[str, Any]:
    """Returns the JSON schema of recipes: what editors complete and check a YAML file by."""
    return {"$schema": SCHEMA_ID, **Recipe.model_json_schema(mode="validation"), "title": SCHEMA_TITLE}


def schema_text() -> str:
    """Returns the schema as it is written to a file."""
    return json.dumps(recipe_schema(), indent=1) + "\n"


def _flat(values: Mapping[str, Any], before: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and key in _SECTIONS:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


_SECTIONS = {name for name, value in Recipe() if isinstance(value, BaseModel)}


def _lines(section: BaseModel, default: BaseModel, everything: bool, indent: str) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value, usual = getattr(section, name), getattr(default, name)
        if isinstance(value, BaseModel):
            inner = list(_lines(value, usual, everything, indent + "  "))
            if inner:
                described = (type(value).__doc__ or "").strip().splitlines()[0]
                yield f"{indent}{name}:  # {described}"
                yield from inner
        elif everything or value != usual:
            if name == "sources":
                yield from _explained(f"{indent}{name}:", field.description, indent)
                for source in value:
                    given = source.model_dump(mode="json", exclude_defaults=True)  # of many keys it has few
                    yield f"{indent}  - {_flow(given)}"
            else:
                written = _flow(section.model_dump(mode="json", include={name})[name])
                yield from _explained(f"{indent}{name}: {written}", field.description, indent)


def _explained(line: str, description: str | None, indent: str) -> Iterator[str]:
    """Yields a key's line with its comment, behind it or above it."""
    whole = f"{line}  # {description}"
    if description and len(whole) > LINE:
        yield from textwrap.wrap(
            description,
            LINE - 28,
            initial_indent=f"{indent}# ",
            subsequent_indent=f"{indent}# ",
            break_on_hyphens=False,
        )
    yield whole if description and len(whole) <= LINE else line


def _flow(value: Any) -> str:
    written = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=WIDTH, allow_unicode=True)
    return written.removesuffix("...\n").strip()
