"""Source code of Python's standard library, that of the Python that runs: nothing is fetched and nothing is shipped.

Evaluation asks about some modules; calibration reads the others.
"""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path

from moacompress.core.errors import DataError

_ASKED = """
asyncio/base_events bdb calendar configparser difflib fileinput ftplib gettext http/client imaplib logging/handlers mailbox
optparse poplib pstats shutil smtplib statistics tarfile tempfile urllib/request wave xml/dom/minidom
"""
ASKED = tuple(_ASKED.split())
"""Modules that evaluation asks about, files that every supported Python has, without their ending."""
NO_SOURCE = ("encodings", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo")
"""Folders that are not read: tables, tests, programs, and what is installed."""
SHORTEST = 12_000
"""Characters that a module has at least to be calibrated on."""


@functools.cache
def read_modules(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Returns modules by their paths without an ending, each with its source.

    Raises:
        DataError: this Python comes without one of them.
    """
    folder = _folder()
    try:
        return tuple((name, (folder / f"{name}.py").read_text("utf-8")) for name in names)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the source of Python's standard library is asked for, which {folder} lacks ({error}); ask for other tasks and "
            "sources, or run a Python that has its source"
        ) from error


@functools.cache
def calibration_modules() -> tuple[str, ...]:
    """Returns the source of every long module that evaluation does not ask about.

    Raises:
        DataError: this Python comes without its source.
    """
    folder = _folder()
    packages = [path for path in folder.iterdir() if path.is_dir() and path.name not in NO_SOURCE]
    found = [*folder.glob("*.py"), *(path for package in packages for path in package.rglob("*.py"))]
    paths = sorted(path.relative_to(folder) for path in found)
    names = [path.with_suffix("").as_posix() for path in paths if not {*path.parts[:-1]} & {*NO_SOURCE}]
    read = tuple(name for name in names if name not in ASKED)
    texts = [text for _, text in read_modules(read or ("os",))]  # a Python without source is refused
    return tuple(text for text in texts if len(text) >= SHORTEST)


def _folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))
