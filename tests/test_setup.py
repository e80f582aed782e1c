"""What `setup.py` gives the compiler on machines and systems that are not this one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moacompress.kernels.cpu import library

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def setup(load_script: Callable[[Path], Any]) -> Any:
    return load_script(ROOT / "setup.py")


@pytest.mark.parametrize("machine", ["x86_64", "AMD64", "aarch64", "arm64", "riscv64"])
def test_only_sources_of_the_machine_get_flags(setup: Any, monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    monkeypatch.setattr(setup, "platform", SimpleNamespace(machine=lambda: machine))
    monkeypatch.setattr(setup, "_compiles", lambda command, flags, program: True)
    sources = {path.name for path in (ROOT / setup.FOLDER).glob("*.cpp")}
    sets = {name for name in sources if setup.instruction_flags(name)}
    assert sets == set(setup.SETS.get(machine, {}))
    assert {f"isa_{name}.cpp" for names in library.ISAS_OF.values() for name in names} < sources
    names = {name.removeprefix("isa_").removesuffix(".cpp") for name in sets}
    assert names <= set(library.ISAS_OF.get("x86_64" if machine == "AMD64" else machine, ()))


def test_flags_that_a_compiler_does_not_know_are_left_out(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "_compiles", lambda command, flags, program: False)
    for machine, sets in setup.SETS.items():
        monkeypatch.setattr(setup, "platform", SimpleNamespace(machine=lambda name=machine: name))
        for source, flags in sets.items():
            recent = setup.RECENT.get(source, ((), ""))[0]
            assert setup.instruction_flags(source) == tuple(flag for flag in flags if flag not in recent)


def test_on_macos_the_stub_has_every_function_of_torch(
    setup: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(setup, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(setup, "_run", lambda command: None)
    assert "-ltorch_cpu" in setup.link_torch(["c++"], tmp_path)
    made = [line.split()[3] for line in (tmp_path / "stub.cpp").read_text("utf-8").splitlines()]
    header = (ROOT / setup.FOLDER / "torch_abi.h").read_text("utf-8")
    block = header[header.index("#pragma GCC visibility push") : header.index("#pragma GCC visibility pop")]
    assert len(made) == sum("torch_" in line and "(" in line for line in block.splitlines())


def test_windows_has_no_kernels(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "sys", SimpleNamespace(platform="win32"))
    assert setup.missing() == "they are built on Linux and macOS only, this is win32"


def test_kernels_can_be_left_out(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOACOMPRESS_NO_EXT", "1")
    monkeypatch.setattr(setup, "REQUIRE", False)
    assert setup.missing() == "MOACOMPRESS_NO_EXT=1"
    assert setup.extensions() == []
    monkeypatch.setattr(setup, "REQUIRE", True)
    with pytest.raises(
        SystemExit, match="MOACOMPRESS_REQUIRE_EXT=1, but the CPU kernels cannot be built: MOACOMPRESS_NO_EXT=1"
    ):
        setup.extensions()
