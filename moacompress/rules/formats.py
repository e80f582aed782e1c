"""The formats that keys and values can be cached in, and what a vector of each takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
DTYPE_ALIASES = {
    "fp32": "float32",
    "float": "float32",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp64": "float64",
    "double": "float64",
}
"""What else people call dtypes; files and results have the names above."""


def dtype_name(text: str) -> str:
    """Returns the name of a dtype that is given as "fp16", "half" or "torch.float16", say; an unknown name as it is."""
    name = text.strip().lower().removeprefix("torch.")
    return DTYPE_ALIASES.get(name, name)


class Format(Protocol):
    """How a key or a value is kept.

    Attributes:
        name: as a plan writes it.
        code: as a rule table and the kernels write it.
        bits: of the code that a number is kept as; 0 where numbers are kept themselves.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def code(self) -> int: ...  # noqa: D102

    @property
    def bits(self) -> int: ...  # noqa: D102

    def vector_bytes(self, dim: int, dtype: str) -> int:
        """Returns the bytes of one vector.

        Args:
            dim: its numbers.
            dtype: the model's.
        """
        ...


@dataclass(frozen=True)
class Native:
    """As the model computes it, in its dtype."""

    name: str = "native"
    code: int = 0
    bits: int = 0

    def vector_bytes(self, dim: int, dtype: str) -> int:
        """Returns the bytes of a vector of `dim` numbers, its share of scales and zero points included."""
        return dim * DTYPE_BYTES[dtype]


@dataclass(frozen=True)
class Integer:
    """Codes of so many bits, and a scale and a zero point of each vector: `docs/formats.md`."""

    bits: int
    code: int

    @property
    def name(self) -> str:
        """Such as `int4`."""
        return f"int{self.bits}"

    def vector_bytes(self, dim: int, dtype: str) -> int:
        """Returns the bytes of a vector of `dim` numbers, its share of scales and zero points included."""
        return -(-dim * self.bits // 32) * 4 + VECTOR_NUMBERS


VECTOR_NUMBERS = 4
"""Bytes of the scale and the zero point of a vector of codes."""
NATIVE = Native().name
FORMATS: Mapping[str, Format] = {format.name: format for format in (Native(), Integer(8, 1), Integer(4, 2))}
"""Every format by its name; a new one is a class and an entry here."""
FORMAT_NAMES = {format.code: name for name, format in FORMATS.items()}
"""Names of the formats by their codes."""
CODED = tuple(name for name, format in FORMATS.items() if isinstance(format, Integer))
"""Names of the formats that keep integer codes, the most exact first: what a KV head may have instead of native."""


def at_least_as_exact(name: str, other: str) -> bool:
    """Returns whether a format, by its name, rounds no more than another one."""
    ours, theirs = FORMATS[name], FORMATS[other]
    if isinstance(ours, Integer) and isinstance(theirs, Integer):
        return ours.bits >= theirs.bits
    return name in (other, NATIVE)
