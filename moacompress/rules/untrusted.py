"""What a plan holds that nobody may trust: JSON values, each asked for by its kind, its size and its bounds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from moacompress.core.errors import PlanError
from moacompress.core.files import finite_json

MAX_DEPTH = 64
"""Deepest nesting of a plan's notes."""


def short(value: Any) -> str:
    """Returns a value as an error shows it."""
    text = json.dumps(finite_json(value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def whole(value: Any, name: str, low: int, high: int) -> int:
    """Returns a whole number within bounds.

    Raises:
        PlanError: it is none; the message begins with the name.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise PlanError(f"{name} must be a whole number, not {short(value)!r}")
    if not low <= value <= high:
        raise PlanError(f"{name} is {value}, outside {low}..{high}")
    return value


def an_object(data: Any, name: str, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """Returns an object with all of the keys that are required, and no other ones but those that may be left out.

    Raises:
        PlanError: it is none; the message begins with the name.
    """
    if not isinstance(data, dict):
        raise PlanError(f"{name} must be an object, not {short(data)!r}")
    unknown = sorted(str(key) for key in data if key not in required and key not in optional)
    if unknown:
        raise PlanError(f"{name} has the unknown key {unknown[0]!r}; known are {', '.join([*required, *optional])}")
    missing = [key for key in required if key not in data]
    if missing:
        raise PlanError(f"{name} lacks the key {missing[0]!r}")
    return data


def a_list(value: Any, name: str, size: int) -> list[Any]:
    """Returns a list of so many entries.

    Raises:
        PlanError: it is none; the message begins with the name.
    """
    if not isinstance(value, list):
        raise PlanError(f"{name} must be a list, not {short(value)!r}")
    if len(value) != size:
        raise PlanError(f"{name} has {len(value)} entries, not {size}")
    return value


def a_text(value: Any, name: str) -> str:
    """Returns a short text.

    Raises:
        PlanError: it is none; the message begins with the name.
    """
    if not isinstance(value, str) or len(value) > 256:
        raise PlanError(f"{name} must be a text of at most 256 characters, not {short(value)!r}")
    return value


def room_after(value: Any, room: int, depth: int = MAX_DEPTH) -> int:
    """Returns the room that is left after `value`, negative where it is too much, too deep or not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return -1
    if isinstance(value, dict | list):
        if depth == 0:
            return -1
        for item in value.items() if isinstance(value, dict) else value:
            parts = item if isinstance(value, dict) else (item,)
            for part in parts:
                room = room_after(part, room, depth - 1)
                if room < 0:
                    return -1
    return room - (len(value) if isinstance(value, str) else 1)
