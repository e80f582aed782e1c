"""What runs on a GPU, and why it is plain PyTorch where Triton cannot run; there is no GPU, and none is asked for anything."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moacompress.cli.kernel_line import kernel_line
from moacompress.doctor import checks
from moacompress.kernels import dispatch
from moacompress.kernels.capabilities import Status
from moacompress.kernels.cpu.cpu_backend import CpuBackend
from moacompress.kernels.triton import toolchain
from moacompress.models import placement

NOT_MEASURED = "; how much slower that is there was not measured"


@pytest.fixture(autouse=True)
def _a_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    dispatch.forget()
    yield
    monkeypatch.undo()
    dispatch.forget()


@pytest.fixture
def triton_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "import_problem", lambda: None)
    monkeypatch.setattr(toolchain, "build_problem", lambda: None)


def test_triton(triton_works: None) -> None:
    said = str(checks._gpu_kernel(["a card"]))
    assert said.startswith("triton for attention, and for the gradients of prompts; ")
    assert said.endswith("its speed on a GPU has not been measured")
    assert checks._gpu_kernel([]) is None


def test_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton is not there, or is not wanted."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert checks._gpu_kernel(["a card"]) == f"plain PyTorch: Triton is not installed: pip install triton{NOT_MEASURED}"
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    dispatch.forget()
    assert checks._gpu_kernel(["a card"]) == f"plain PyTorch: {dispatch.VARIABLE} is reference{NOT_MEASURED}"
    monkeypatch.setenv(dispatch.VARIABLE, "fast")
    dispatch.forget()
    assert str(checks._gpu_kernel(["a card"])).startswith(f"none: {dispatch.VARIABLE} is 'fast'")


def test_the_cpus_kernel_is_the_cpus(triton_works: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiled kernels the GPU's would be next."""
    monkeypatch.setattr(CpuBackend, "status", lambda self: Status(False, "there is no compiler"))
    assert dispatch.choose(None, dispatch.backends()).name == "triton"
    wanted = (
        f"there is no compiler; a decode step takes {dispatch.REFERENCE_TIMES} times as long as with compiled kernels"
    )
    assert checks._kernel() == {"name": "reference", "isa": None, "reason": wanted}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("lacks", ["triton", "a compiler"])
def test_what_triton_lacks_is_said(lacks: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By `doctor`, and by the first line of a command on the card; the CPU's line has nothing of it."""
    monkeypatch.setattr(toolchain, "_import_error", toolchain._import_error.__wrapped__)
    monkeypatch.setattr(placement, "check_device", lambda name: None)
    if lacks == "triton":
        monkeypatch.setitem(sys.modules, "triton.language", None)
        reason = (
            "Triton cannot be imported (ModuleNotFoundError: import of triton.language halted; None in sys.modules)"
        )
    else:
        monkeypatch.setattr(toolchain, "import_problem", lambda: None)
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("CC", "a-compiler")
        reason = "Triton finds no 'a-compiler', which CC names"
    said, line = str(checks._gpu_kernel(["a card"])), kernel_line("cuda:0")
    assert said.startswith(f"plain PyTorch: {reason}")
    assert line.startswith(f"kernels: plain PyTorch on cuda:0, as {reason}")
    assert said.endswith(NOT_MEASURED)
    assert line.endswith(NOT_MEASURED)
    assert "riton" not in kernel_line(None)


def test_what_triton_builds_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    headers, programs = tmp_path / "include", tmp_path / "bin"
    for folder in (headers, programs):
        folder.mkdir()
    monkeypatch.setattr(toolchain, "_python_headers", lambda: str(headers))
    environ = {"PATH": str(programs)}

    def problem(**more: str) -> str:
        return str(toolchain.build_problem(environ | more, "linux"))

    assert problem().startswith("Triton finds no C compiler (gcc, clang), and builds its launchers with one: install")
    assert toolchain.build_problem(environ, "win32") is None
    shutil.copy("/bin/sh", programs / "clang")
    assert problem().startswith(f"Triton finds no Python.h in {headers}: install Python's headers")
    (headers / "Python.h").touch()
    assert toolchain.build_problem(environ, "linux") is None
    assert "no 'gcc', which CC names" in problem(CC="gcc")
    (headers / "Python.h").rename(programs / "Python.h")
    assert toolchain.build_problem(environ | {"CPATH": f"/nowhere:{programs}"}, "linux") is None
