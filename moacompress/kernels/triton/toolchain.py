"""Whether Triton can be imported, and whether what it builds its launchers with is here; nothing is compiled to find out."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from moacompress.core.errors import one_line

COMPILERS = ("gcc", "clang")
HEADERS = ("CPATH", "C_INCLUDE_PATH")
"""Variables that name folders where a C compiler looks for headers too."""


def import_problem() -> str | None:
    """Returns why Triton cannot be imported, and what to do; None where it was."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    error = _import_error()
    if error is None:
        return None
    return (
        f"Triton cannot be imported ({error}): pip install --force-reinstall triton, in the version that torch asks for"
    )


@functools.cache
def _import_error() -> str | None:
    try:
        importlib.import_module("triton.language")
    except Exception as error:  # a package that is broken raises whatever it raises
        return f"{type(error).__name__}: {one_line(error)}"
    return None


def build_problem(environ: Mapping[str, str] = os.environ, system: str = sys.platform) -> str | None:
    """Returns what of a C compiler and Python's headers Triton lacks, and what to do; None where all is there.

    Triton builds what launches a kernel from C when the first one runs, by the compiler that `CC` names; on other systems than
    Linux it may bring one.
    """
    if system != "linux":
        return None
    named = environ.get("CC")
    names = COMPILERS if named is None else (named,)
    if not any(shutil.which(name, path=environ.get("PATH")) for name in names):
        missing = "no C compiler (gcc, clang)" if named is None else f"no {named!r}, which CC names"
        return f"Triton finds {missing}, and builds its launchers with one: install gcc or clang, or set CC"
    folders = [_python_headers(), *(each for name in HEADERS for each in environ.get(name, "").split(os.pathsep))]
    if not any((Path(folder) / "Python.h").is_file() for folder in folders if folder):
        return f"Triton finds no Python.h in {folders[0]}: install Python's headers, such as python3-dev"
    return None


def _python_headers() -> str:
    scheme = sysconfig.get_default_scheme()
    return sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]  # as Triton does
