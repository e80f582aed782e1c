"""Which builds are left out: those of sources and tools that were built and checked as they are.

A test marked `builds(of)` compiles for a while. `tests/builds.json` holds, for each of them, a digest of everything that its
outcome depends on, taken when it last passed under `--builds`, which `make test-builds` and `make test-all` give. While the
digest is the same the test is skipped elsewhere; with another source, flag, compiler or setuptools it runs.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "tests" / "builds.json"
PROPERTY = "builds"


def kernel_files() -> Iterator[Path]:
    """Yields what the kernels are built from."""
    yield ROOT / "setup.py"
    for end in ("cpp", "h", "inl"):
        yield from (ROOT / "moacompress" / "kernels" / "cpu").glob(f"*.{end}")


def packaging_files() -> Iterator[Path]:
    """Yields what a wheel is made from: of the Python modules the folders alone."""
    yield from kernel_files()
    for name in ("pyproject.toml", "MANIFEST.in", "_moacompress_autoload.py", "tests/test_packaging.py"):
        yield ROOT / name
    for top in ("moacompress", "calibration", "recipes", "search"):
        for path in (ROOT / top).rglob("*"):
            if path.name == "__init__.py":
                yield path.parent
            elif path.is_file() and path.suffix not in (".py", ".pyc", ".so"):
                yield path


def abi_files() -> Iterator[Path]:
    """Yields what is compared with the headers of the torch that is here."""
    yield ROOT / "moacompress" / "kernels" / "cpu" / "torch_abi.h"
    yield ROOT / "tests" / "kernels" / "test_torch_abi.py"


def core_files() -> Iterator[Path]:
    """Yields what the kernels' core is tested with, without torch."""
    yield from kernel_files()
    yield from (ROOT / "tests" / "kernels").glob("*core*")


def triton_files() -> Iterator[Path]:
    """Yields the Triton kernels, what they take their constants from, and what compiles them."""
    package = ROOT / "moacompress"
    yield from (package / "kernels" / "triton").glob("*.py")
    for name in ("kernels/kv_parts.py", "kernels/reference/codes.py", "rules/formats.py", "rules/windows.py"):
        yield package / name
    yield ROOT / "benchmarks" / "triton_resources.py"
    yield ROOT / "tests" / "kernels" / "test_triton_resources.py"


def arm_files() -> Iterator[Path]:
    """Yields what the kernels are tested with as they are built for ARM."""
    yield from core_files()
    for name in ("operators_server.cpp", "emulated.py", "conftest.py"):
        yield ROOT / "tests" / "kernels" / name


ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
BUILDS: dict[str, tuple[Callable[[], Iterator[Path]], tuple[str, ...], tuple[str, ...]]] = {
    "arm": (arm_files, (), (ARM_COMPILER, ARM_EMULATOR)),
    "core": (core_files, (), ()),
    "packages": (packaging_files, ("build", "setuptools"), ()),
    "torch_abi": (abi_files, ("torch",), ()),
    "triton": (triton_files, ("triton",), ()),
}
"""What each kind of build depends on beside the compiler: its files, installed distributions, and other programs."""


@functools.cache
def digest(of: str) -> str:
    """Returns the digest of all that a kind of build depends on."""
    files, distributions, programs = BUILDS[of]
    total = hashlib.sha256()
    for path in sorted(set(files())):
        total.update(f"{path.relative_to(ROOT)}\n".encode())
        total.update(hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"a folder")
    tools = [f"{name} {importlib.metadata.version(name)}" for name in distributions]
    tools += [version_of([program]) for program in programs]
    total.update(repr([compiler(), platform.machine(), *platform.python_version_tuple()[:2], *tools]).encode())
    return total.hexdigest()


def compiler() -> str:
    """Returns what the C++ compiler says of itself; nothing where there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    return next(filter(None, map(version_of, [named] if named else [["c++"], ["g++"], ["clang++"]])), "")


def version_of(command: list[str]) -> str:
    """Returns what a program says of itself; nothing where there is none."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout


def read() -> dict[str, str]:
    """Returns the digests that are written down, by the names of their tests."""
    found: dict[str, str] = json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}
    return found


def leave_out(items: list[pytest.Item], *, none: bool) -> None:
    """Notes of every build what it depends on, and skips those that were checked as they are, unless `none` is wanted."""
    checked = read()
    for item in items:
        for mark in item.iter_markers("builds"):
            found = digest(*mark.args)
            item.user_properties.append((PROPERTY, found))
            if not none and checked.get(item.nodeid) == found:
                item.add_marker(
                    pytest.mark.skip(reason="was built and checked as it is; `make test-builds` does so again")
                )


class Recorder:
    """Writes down what passes; forgets what fails."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Takes one part of a test: its fixtures, itself, or what comes after it."""
        found = dict(report.user_properties).get(PROPERTY)
        if not isinstance(found, str) or (report.passed and report.when != "call"):
            return
        checked = read()
        checked.pop(report.nodeid, None)
        if report.passed:
            checked[report.nodeid] = str(found)
        FILE.write_text(json.dumps(dict(sorted(checked.items())), indent=2) + "\n", "utf-8")
