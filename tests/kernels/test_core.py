"""The core without torch, under the address and undefined-behaviour sanitizers: `core_test.cpp` says what it checks."""

from __future__ import annotations

import importlib.util
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="module")
def build_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("moacompress_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.builds("core")
def test_under_sanitizers(build_script: ModuleType, tmp_path: Path) -> None:
    command = build_script.compiler()
    if command is None:
        pytest.skip("no C++ compiler is here (CXX, c++, g++, clang++), so the core cannot be built by itself")
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    done = subprocess.run(
        [*command, *SANITIZE, str(probe), "-o", str(tmp_path / "probe")], capture_output=True, check=False
    )
    if done.returncode or subprocess.run([str(tmp_path / "probe")], capture_output=True, check=False).returncode:
        pytest.skip(f"{command[0]} has no address sanitizer here: {done.stderr.decode()[:200]}")
    flags = [flag for flag in build_script.FLAGS if flag not in ("-O3", "-fPIC")]

    def make(source: Path) -> str:
        made = str(tmp_path / f"{source.name}.o")
        sets = build_script.instruction_flags(source.name)
        run = [*command, *flags, "-O0", *SANITIZE, *sets, "-Werror", "-c", str(source), "-o", made]
        built = subprocess.run(run, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr[-3000:]
        return made

    sources = [
        path for path in sorted((ROOT / build_script.FOLDER).glob("*.cpp")) if not path.name.startswith("binding")
    ]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(make, [*sources, Path(__file__).parent / "core_test.cpp"]))
    program = str(tmp_path / "core_test")
    subprocess.run([*command, *SANITIZE, *objects, "-o", program, "-lpthread"], check=True, capture_output=True)
    ran = subprocess.run([program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-3000:]
    assert ran.stdout.rstrip().endswith("0 failures")
    assert int(ran.stdout.split(" tests, ")[0].split()[-1]) >= 160
