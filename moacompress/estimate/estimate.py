"""What a person and a program are told of what a command will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moacompress.core.tables import readable_seconds

BUSY = 1.5
"""How many times as long as alone work must take for the machine to count as busy."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a command will take.

    Attributes:
        seconds: in all, alone on the machine.
        text: sentences for a person.
        facts: counts, bytes and parts of the time by their JSON names.
        slowdown: how many times as long what was timed took beside whatever else ran then.
    """

    seconds: float
    text: Sequence[str]
    facts: Mapping[str, Any] = field(default_factory=dict)
    slowdown: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values; a fact named `seconds` stands in the place of the total."""
        values = {"seconds": self.seconds, "slowdown": self.slowdown, **self.facts}
        return {"estimate": True, **_rounded(values), "slowdown": round(self.slowdown, 2)}

    def lines(self) -> list[str]:
        """Returns the sentences, and one more where the machine was busy."""
        if self.slowdown < BUSY:
            return [*self.text]
        return [
            *self.text,
            "The machine is busy: this is the time it takes alone; beside what runs now it would be about "
            f"{readable_seconds(self.seconds * self.slowdown)}.",
        ]

    def line(self) -> str:
        """Returns the same as one line."""
        return " ".join(self.lines())


def _rounded(value: Any) -> Any:
    """Returns JSON values with milliseconds as the smallest part of a number."""
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value
