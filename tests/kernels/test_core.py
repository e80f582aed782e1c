"""The core without torch, under the address and undefined-behaviour sanitizers: `core_test.cpp` says what it checks."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.core_build import build_core

ROOT = Path(__file__).resolve().parent.parent.parent
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.mark.builds("core")
def test_under_sanitizers(load_script: Callable[[Path], Any], tmp_path: Path) -> None:
    setup = load_script(ROOT / "setup.py")
    command = setup.compiler()
    if command is None:
        pytest.skip("no C++ compiler is here (CXX, c++, g++, clang++), so the core cannot be built by itself")
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    done = subprocess.run(
        [*command, *SANITIZE, str(probe), "-o", str(tmp_path / "probe")], capture_output=True, check=False
    )
    if done.returncode or subprocess.run([str(tmp_path / "probe")], capture_output=True, check=False).returncode:
        pytest.skip(f"{command[0]} has no address sanitizer here: {done.stderr.decode()[:200]}")
    flags = [flag for flag in setup.FLAGS if flag not in ("-O3", "-fPIC")]
    build_core(setup, command, [*flags, "-O0", *SANITIZE], tmp_path, "core_test.cpp")
    ran = subprocess.run([str(tmp_path / "core_test")], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-3000:]
    assert ran.stdout.rstrip().endswith("0 failures")
    assert int(ran.stdout.split(" tests, ")[0].split()[-1]) >= 160
