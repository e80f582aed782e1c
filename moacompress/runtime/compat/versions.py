"""The minor versions of transformers that moacompress is tested with, and which of them is here.

`TESTED` is the one list of them: the test matrix, `doctor`, and what is said of an untested one are made of it. Nothing but the
standard library is needed to import this module.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

TESTED = ("5.17", "5.18", "5.19", "5.20", "5.21", "5.22", "5.23", "5.24", "5.25")
"""Minor versions of transformers whose every test passes, the oldest first, without a gap."""


def minor(full: str) -> tuple[int, int]:
    """Returns the numbers of a minor version: (5, 24) of "5.24.1"; (0, 0) of what is no version."""
    found = re.match(r"(\d+)\.(\d+)", full)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def installed() -> str:
    """Returns the version of transformers that is installed, "" where none is."""
    try:
        return version("transformers")
    except PackageNotFoundError:
        return ""


def is_tested(full: str) -> bool:
    """Returns whether the minor of a version is a tested one."""
    return minor(full) in {minor(one) for one in TESTED}


def tested_range() -> str:
    """Returns the tested minors in words: "5.17 to 5.25"."""
    return f"{TESTED[0]} to {TESTED[-1]}"


def requirement() -> str:
    """Returns what pip is asked for to get a tested one: "transformers>=5.17,<5.26"."""
    major, last = minor(TESTED[-1])
    return f"transformers>={TESTED[0]},<{major}.{last + 1}"


INSTALLED = minor(installed())
"""The numbers of the minor version that is here, by which `alternates` are chosen."""
