"""The core without torch as it is built for 64-bit ARM, in an emulator: `core_test.cpp` says what it checks.

A processor that is emulated says nothing about speed.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.builds import ARM_COMPILER, ARM_EMULATOR
from tests.kernels.core_build import build_core

ROOT = Path(__file__).resolve().parent.parent.parent


def run(program: Path, processor: str, *arguments: str) -> str:
    """Returns what a program prints on a processor."""
    command = [ARM_EMULATOR, "-cpu", processor, str(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


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
def core_test(arm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns `core_test.cpp` as a program for ARM, compiled as the library is."""
    program = tmp_path_factory.mktemp("arm") / "core_test"
    build_core(arm, arm.compiler(), [*arm.FLAGS, "-static"], "core_test.cpp", program)
    return program


@pytest.mark.builds("arm")
def test_all_sets(core_test: Path) -> None:
    lines = run(core_test, "max").splitlines()
    for name in ("portable", "neon", "neon_bf16"):
        assert f"{name}: not on this processor" not in lines
    assert lines[-1].endswith("0 failures")
    assert int(lines[-1].split()[0]) >= 900


@pytest.mark.builds("arm")
@pytest.mark.parametrize(("processor", "best"), [("cortex-a72", "neon"), ("max", "neon_bf16")])
def test_the_best_set_of_a_processor(core_test: Path, processor: str, best: str) -> None:
    assert run(core_test, processor, "best") == f"best: {best}\n"
