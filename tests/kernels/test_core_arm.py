"""The kernels as they are built for 64-bit ARM, in an emulator.

`core_test.cpp` says what it checks, and the tests of the operators beside this file run on them through `operators_server.cpp`.

A processor that is emulated says nothing about speed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moacompress.kernels.cpu import library
from tests.builds import ARM_COMPILER, ARM_EMULATOR
from tests.kernels.core_build import build_core
from tests.kernels.emulated import VARIABLE

ROOT = Path(__file__).resolve().parent.parent.parent
MODULES = (
    "codes",
    "cpu_kernels",
    "gradients",
    "linear",
    "profile_kernel",
    "selecting",
    "step_layer",
    "tiled",
)
"""Tests of the operators that run in the emulator, `test_NAME.py`, or some of them."""


@pytest.fixture(scope="module")
def arm(load_script: Callable[[Path], Any]) -> Iterator[Any]:
    """Returns setup.py as it builds for ARM."""
    lacking = [command for command in (ARM_COMPILER, ARM_EMULATOR) if shutil.which(command) is None]
    if lacking:
        pytest.skip(f"{' and '.join(lacking)} not found (Debian's g++-aarch64-linux-gnu and qemu-user)")
    with pytest.MonkeyPatch.context() as patch:
        setup = load_script(ROOT / "setup.py")
        patch.setenv("CXX", ARM_COMPILER)
        patch.setattr(setup, "platform", SimpleNamespace(machine=lambda: "aarch64"))
        yield setup


@pytest.fixture(scope="module")
def programs(arm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder with `core_test` and `operators_server` for ARM, compiled as the library is."""
    folder = tmp_path_factory.mktemp("arm")
    build_core(arm, arm.compiler(), [*arm.FLAGS, "-static"], folder, "core_test.cpp", "operators_server.cpp")
    return folder


def run(program: Path, processor: str, *arguments: str) -> str:
    """Returns what a program prints on a processor."""
    command = [ARM_EMULATOR, "-cpu", processor, str(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.builds("arm")
def test_the_core(programs: Path) -> None:
    lines = run(programs / "core_test", "max").splitlines()
    for name in ("portable", "neon", "neon_bf16"):
        assert f"{name}: not on this processor" not in lines
    assert lines[-1].endswith("0 failures")
    assert int(lines[-1].split()[0]) >= 900


@pytest.mark.builds("arm")
@pytest.mark.parametrize(("processor", "best"), [("cortex-a72", "neon"), ("max", "neon_bf16")])
def test_the_best_set_of_a_processor(programs: Path, processor: str, best: str) -> None:
    assert run(programs / "core_test", processor, "best") == f"best: {best}\n"


@pytest.mark.builds("arm")
def test_the_operators(programs: Path, kernels_cannot_run: Callable[[str | None], None]) -> None:
    """Random configurations, by the tests that this machine's own kernels pass too."""
    kernels = library.load()
    if kernels.isa is None:
        kernels_cannot_run(kernels.reason)
    files = [str(ROOT / f"tests/kernels/test_{name}.py") for name in MODULES]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not heavy", "-k", "random or reference or put or evicted"]
    environment = {**os.environ, VARIABLE: f"{ARM_EMULATOR} -cpu max {programs / 'operators_server'}"}
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    words = done.stdout.splitlines()[-1].split()
    assert "skipped" not in words
    assert int(words[0]) >= 500
