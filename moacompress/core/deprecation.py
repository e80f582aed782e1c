"""Names that changed and go on working for two minor versions: arguments of functions, options of commands, keys of recipes.

A renaming is one line in `RENAMED`. Whoever uses the old name is told the new one, and the version in which the old one goes. A
test fails once a line has outlived that version.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

RECIPE = "recipe"
"""Where keys of recipes are renamed."""
KEPT = 2
"""Minor versions in which an old name works, the one that renames it included."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Renaming:
    """A name that is another one now.

    Attributes:
        where: `moacompress.compress` for an argument, `moacompress search` for an option, `recipe` for a key.
        old: the name until then: `samples`, `--samples` or `calibration.samples`.
        new: the name since, in the same form; a key stays in its section.
        since: the first version that has the new one, such as `0.2`.
    """

    where: str
    old: str
    new: str
    since: str

    @property
    def goes(self) -> str:
        """The first version without the old name."""
        major, minor = _minor(self.since)
        return f"{major}.{minor + KEPT}"

    def __str__(self) -> str:
        """Returns what whoever uses the old name is told."""
        return f"{self.old} of {self.where} is called {self.new} since {self.since}; {self.old} goes in {self.goes}"


RENAMED: tuple[Renaming, ...] = ()
"""All old names that still work."""


def overdue(version: str) -> list[Renaming]:
    """Returns the renamings whose old name a version should not have any more."""
    return [each for each in RENAMED if _minor(version) >= _minor(each.goes)]


def renamed_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Has a function that `moacompress` exports take old names of its keyword arguments, with a `DeprecationWarning`.

    Raises (the function):
        TypeError: old and new name are both given.
    """
    where = f"moacompress.{function.__name__}"

    @functools.wraps(function)
    def taking(*args: P.args, **kwargs: P.kwargs) -> R:
        for each in _of(where):
            if each.old not in kwargs:
                continue
            if each.new in kwargs:
                raise TypeError(_both(each))
            warnings.warn(str(each), DeprecationWarning, stacklevel=2)
            kwargs[each.new] = kwargs.pop(each.old)
        return function(*args, **kwargs)

    return taking


def with_new_options(command: str, arguments: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """Returns the arguments of a command line with new names for old ones.

    Args:
        command: as it is called, such as `moacompress search`.
        arguments: what follows it.
        say: tells a person.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    found = list(arguments)
    for index, argument in enumerate(arguments[:end]):
        name, equals, value = argument.partition("=")
        for each in _of(command):
            if each.old == name:
                say(str(each))
                found[index] = f"{each.new}{equals}{value}"
    return found


def new_key(key: str) -> str:
    """Returns the name that a key of recipes has now, such as `search.trials`, and logs a warning of an old one."""
    for each in _of(RECIPE):
        if each.old == key:
            logger.warning("%s", each)
            return each.new
    return key


def with_new_keys(data: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a recipe under their new names.

    Args:
        data: keys to values; sections are mappings of their own.

    Raises:
        ValueError: old and new name are both given.
    """
    for each in _of(RECIPE):
        section, _, old = each.old.rpartition(".")
        held = data.get(section) if section else data
        if not isinstance(held, dict) or old not in held:
            continue
        new = each.new.rpartition(".")[2]
        if new in held:
            raise ValueError(_both(each))
        logger.warning("%s", each)
        moved = {new if key == old else key: value for key, value in held.items()}
        data = {**data, section: moved} if section else moved
    return data


def _of(where: str) -> list[Renaming]:
    return [each for each in RENAMED if each.where == where]


def _both(each: Renaming) -> str:
    return f"{each.old} and {each.new} of {each.where} are one; give {each.new} alone"


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
