"""The formats that keys and values can be cached in, and what a vector of each takes.

`FORMATS` are ours, which every backend keeps. Installed packages add others, which the reference keeps: `find_format` knows
all, and looks for packages once a name is none of ours.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from moacompress.core import plugins

logger = logging.getLogger(__name__)

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
        """Returns the bytes of a vector of `dim` numbers, where the model's own are of `dtype`."""
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
    """Codes of so many bits, and a scale and a zero point of each vector: `docs/formats.md`.

    A vector's codes are kept in rows of whole words of 4 bytes: of 8 bits a row with a code in each byte, of 4 bits one with
    two, of 6 bits three rows whose columns have four codes.
    """

    bits: int
    code: int

    @property
    def name(self) -> str:
        """Such as `int4`."""
        return f"int{self.bits}"

    def vector_bytes(self, dim: int, dtype: str) -> int:
        """Returns the bytes of a vector of `dim` numbers, its share of scales and zero points included."""
        return self.rows * -(-dim // (4 * self.parts)) * 4 + VECTOR_NUMBERS

    @property
    def rows(self) -> int:
        """Rows of bytes that a vector's codes lie in."""
        return 3 if self.bits == 6 else 1

    @property
    def parts(self) -> int:
        """Codes that share the bytes of a column of all rows, each of another part of the vector."""
        return 8 * self.rows // self.bits


VECTOR_NUMBERS = 4
"""Bytes of the scale and the zero point of a vector of codes."""
NATIVE = Native().name
FORMATS: Mapping[str, Format] = {
    format.name: format for format in (Native(), Integer(8, 1), Integer(6, 3), Integer(4, 2))
}
"""Every format of ours by its name; a new one is a class and an entry here."""
OUTSIDE_CODE = 16
"""Code of the first format of installed packages; codes are of one process, names of files."""
MAX_BITS = 16
_BY_CODE = {format.code: format for format in FORMATS.values()}
_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
_CALLS = ("vector_bytes", "encode", "decode")


@dataclass(frozen=True)
class Outside:
    """A format of an installed package.

    Attributes:
        given: what the package gives, a `moacompress.kernels.kv_format.KVFormat`.
        code: in this process.
    """

    given: Any
    code: int

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.given.name)

    @property
    def bits(self) -> int:
        """Bits of a number, about: what reports show."""
        return int(self.given.bits)

    def vector_bytes(self, dim: int, dtype: str) -> int:
        """Returns the bytes of a vector of `dim` numbers, all that is kept of it."""
        return int(self.given.vector_bytes(dim, dtype))


@functools.cache
def outside_formats() -> Mapping[str, Outside]:
    """Returns the formats of installed packages by name; what is none, or has a name of another, is left out with a warning."""
    found: dict[str, Outside] = {}
    for name, given in plugins.plugins(plugins.FORMATS):
        problem = _problem(given) or ("has the name of another format" if given.name in (*FORMATS, *found) else "")
        if problem:
            logger.warning("%s, an entry point of %s, %s and is left out", name, plugins.FORMATS, problem)
        else:
            found[given.name] = Outside(given, OUTSIDE_CODE + len(found))
    return found


def _problem(given: Any) -> str:
    name, bits = getattr(given, "name", None), getattr(given, "bits", None)
    if isinstance(given, type) or not all(callable(getattr(given, call, None)) for call in _CALLS):
        return f"is no format: an object with {', '.join(_CALLS)}"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return f"has the name {name!r}, which is not of small letters, digits and dashes"
    if not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
        return f"has {bits!r} bits a number, not 1 to {MAX_BITS}"
    return ""


def all_formats() -> Mapping[str, Format]:
    """Returns every format by its name: ours, and then those of installed packages."""
    return {**FORMATS, **outside_formats()}


def is_format(name: str) -> bool:
    """Returns whether there is a format of this name."""
    return name in FORMATS or name in outside_formats()


def find_format(name: str) -> Format:
    """Returns a format by its name.

    Raises:
        KeyError: there is none.
    """
    return FORMATS[name] if name in FORMATS else outside_formats()[name]


def find_code(code: int) -> Format:
    """Returns a format by its code, as a rule table has it.

    Raises:
        KeyError: there is none.
    """
    ours = _BY_CODE.get(code)
    return ours or {format.code: format for format in outside_formats().values()}[code]


CODED = tuple(name for name, format in FORMATS.items() if isinstance(format, Integer))
"""Names of the formats that keep integer codes, the most exact first: what a KV head may have instead of native."""


def at_least_as_exact(name: str, other: str) -> bool:
    """Returns whether a format, by its name, rounds no more than another one."""
    ours, theirs = find_format(name), find_format(other)
    if isinstance(ours, Integer) and isinstance(theirs, Integer):
        return ours.bits >= theirs.bits
    return name in (other, NATIVE)
