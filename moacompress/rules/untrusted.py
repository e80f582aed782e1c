"""What a plan holds that nobody may trust: values checked by pydantic, and one sentence on what is wrong.

A pydantic type says what is allowed; where a value is not, `checked` raises an error that begins with the value's name.
Values are checked up to the first that is wrong: pydantic's list of all of them would take many times a hostile file's memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import ErrorDetails

from moacompress.core.errors import PlanError
from moacompress.core.files import finite_json
from moacompress.core.printable import printable

T = TypeVar("T")
Loc = tuple[int | str, ...]
"""Keys of objects and places in lists that lead to a value."""
MAX_DEPTH = 64
"""Deepest nesting of a plan's notes."""
MAX_TEXT = 256
"""Most characters of a text."""
WRONG_FORM = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)
"""What reading JSON raises that is of another form than was thought."""
_SENTENCES = {
    "model_type": "must be an object, not {input!r}",
    "dict_type": "must be an object, not {input!r}",
    "list_type": "must be a list, not {input!r}",
    "int_type": "must be a whole number, not {input!r}",
    "string_type": f"must be a text of at most {MAX_TEXT} characters, not {{input!r}}",
    "string_too_long": "must be a text of at most {max_length} characters, not {input!r}",
    "greater_than_equal": "is {input}, outside: {ge} is the smallest",
    "less_than_equal": "is {input}, outside: {le} is the largest",
    "value_error": "{error}",
}
"""What is wrong with a value, by the type of pydantic's error."""


class Form(BaseModel):
    """An object with these keys and no others, whose values are not turned into those of other types."""

    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, data: Any) -> Any:
        known = cls.model_fields
        unknown = next((key for key in data if key not in known), None) if isinstance(data, dict) else None
        if unknown is not None:
            raise ValueError(f"has the unknown key {short(unknown)!r}; known are {', '.join(known)}")
        return data


def checked(adapter: TypeAdapter[T], value: Any, name: Callable[[Loc], str]) -> T:
    """Returns a value as its type has it; `name` returns what a message calls a part of it.

    Raises:
        PlanError: it is something else; the message begins with the part's name.
    """
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise PlanError(_sentence(error.errors(include_url=False)[0], name)) from None


def one_of(values: Iterable[T]) -> AfterValidator:
    """Returns a choice among values of one type."""
    known = list(values)

    def check(value: T) -> T:
        if type(value) is not type(known[0]) or value not in known:
            raise ValueError(f"is {short(value)}, not one of {', '.join(map(str, known))}")
        return value

    return AfterValidator(check)


def as_many(size: Callable[[dict[str, Any]], int]) -> BeforeValidator:
    """Returns a size of lists that `size` finds in the fields before them; it is compared before their values are."""

    def check(value: Any, info: ValidationInfo) -> Any:
        with suppress(KeyError):  # that field is wrong itself
            if isinstance(value, list) and len(value) != size(info.data):
                raise ValueError(f"has {len(value)} entries, not {size(info.data)}")
        return value

    return BeforeValidator(check)


def short(value: Any) -> str:
    """Returns a value as an error shows it."""
    text = json.dumps(finite_json(value)) if isinstance(value, list | tuple) else printable(str(value))
    return text if len(text) <= 60 else text[:57] + "..."


def remaining_budget(value: Any, room: int, depth: int = MAX_DEPTH, *, finite: bool = True) -> int:
    """Returns the room that is left after `value`, negative where it is too much, too deep or, if `finite`, not finite."""
    if finite and isinstance(value, float) and not math.isfinite(value):
        return -1
    if isinstance(value, dict | list):
        if depth == 0:
            return -1
        for item in value.items() if isinstance(value, dict) else value:
            parts = item if isinstance(value, dict) else (item,)
            for part in parts:
                room = remaining_budget(part, room, depth - 1, finite=finite)
                if room < 0:
                    return -1
    return room - (len(value) if isinstance(value, str) else 1)


def _sentence(error: ErrorDetails, name: Callable[[Loc], str]) -> str:
    kind, path = error["type"], error["loc"]
    if kind == "missing":
        return f"{name(path[:-1])} lacks the key {path[-1]!r}"
    given = short(error["input"])
    if kind not in _SENTENCES:
        return f"{name(path)} is {given}; {error['msg']}"
    return f"{name(path)} {_SENTENCES[kind].format(input=given, **error.get('ctx', {}))}"


@contextmanager
def reading_notes(what: str) -> Iterator[None]:
    """Says in one sentence what a plan's notes are not, of which only some have a form that is checked as they are loaded.

    Raises:
        PlanError: the block found something else than it wanted.
    """
    try:
        yield
    except WRONG_FORM as error:
        why = short(f"{type(error).__name__}: {error}")
        raise PlanError(f"what the plan's notes say of {what} is damaged: {why}") from error
