"""Which kernel runs, why, and what happens where the wish and the machine do not fit."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path

import pytest
import torch

from moacompress.core.errors import UnsupportedError, UsageError
from moacompress.kernels import dispatch
from moacompress.kernels.capabilities import Status
from moacompress.kernels.cpu import library
from moacompress.kernels.cpu.cpu_backend import CpuBackend
from moacompress.kernels.dispatch import REFERENCE, Choice, choose
from moacompress.kernels.triton.triton_backend import TritonBackend


class Cpu(CpuBackend):
    """The compiled backend on another machine."""

    def __init__(self, status):
        self.said = status

    def status(self):
        return self.said


BUILT = (Cpu(Status(True, "the extension is built for this machine", "avx2")), REFERENCE)
NOT_BUILT = (Cpu(Status(False, "the extension is not built")), REFERENCE)


def test_the_best_there_is():
    assert choose(None, BUILT) == Choice("cpu", "avx2", "the extension is built for this machine")
    assert choose("", NOT_BUILT) == Choice("reference", None, "the extension is not built")


def test_what_is_asked_for():
    assert choose("reference", BUILT).name == "reference"
    assert choose("cpu", BUILT) == Choice("cpu", "avx2", "MOACOMPRESS_KERNEL asks for it", asked=True)
    with pytest.raises(
        UnsupportedError, match="asks for the kernel 'cpu', which cannot run: the extension is not built"
    ):
        choose("cpu", NOT_BUILT)
    with pytest.raises(UsageError, match="MOACOMPRESS_KERNEL is 'fast', not one of cpu, reference"):
        choose("fast", BUILT)


@pytest.fixture
def from_scratch(monkeypatch):
    dispatch.forget()
    yield
    monkeypatch.undo()  # what stands in for a cached function has no cache to clear
    dispatch.forget()


def test_it_is_said_once(from_scratch, caplog, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    with caplog.at_level(logging.INFO, logger="moacompress"):
        dispatch.chosen()
        dispatch.chosen()
    assert [record.getMessage() for record in caplog.records] == ["kernel: reference (MOACOMPRESS_KERNEL asks for it)"]


def test_other_dtypes_run_on_the_reference_unless_the_kernel_is_asked_for(from_scratch, monkeypatch):
    double = torch.zeros(1, 1, 1, dtype=torch.float64)
    monkeypatch.setattr(dispatch, "chosen", lambda: Choice("cpu", "avx2", "built"))
    others = [each.name for each in dispatch.backends() if each.supports("cpu", torch.float64)]  # not the compiled ones
    assert dispatch.backend_for(double).name == others[0]
    assert dispatch.backend_for(double.to(torch.bfloat16)).name == "cpu"
    assert dispatch.backend_for(double.float().to("meta")).name == others[0]
    dispatch._name_for.cache_clear()
    monkeypatch.setattr(dispatch, "chosen", lambda: Choice("cpu", "avx2", "asked", asked=True))
    with pytest.raises(UnsupportedError, match="MOACOMPRESS_KERNEL=cpu cannot run torch.float64 on cpu"):
        dispatch.backend_for(double)


@pytest.mark.parametrize(
    "call", ["decode_selecting", "step", "step_layer", "read_layers", "linear", "profile_backward"]
)
def test_a_call_that_a_backend_lacks_says_so(call):
    assert not any(getattr(REFERENCE.capabilities, name, False) for name in (call, "stack", "profile"))
    given = inspect.signature(getattr(REFERENCE, call)).parameters.values()
    named = {each.name: None for each in given if each.kind == each.KEYWORD_ONLY}
    with pytest.raises(UnsupportedError, match=f"the kernel 'reference' has no {call}"):
        getattr(REFERENCE, call)(*[None] * (len(given) - len(named)), **named)


def test_why_it_is_not_built(tmp_path: Path):
    assert "no C++ compiler is found (c++, g++, clang++)" in library.missing({"PATH": str(tmp_path)})
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    assert "g++ is here" in library.missing({"PATH": str(tmp_path)})
    assert "(my-c++)" in library.missing({"PATH": str(tmp_path), "CXX": "my-c++ -O1"})
    assert library.missing({}, "win32") == "the extension is built on Linux and macOS only, this is win32"


def test_a_library_that_cannot_be_loaded(tmp_path: Path, monkeypatch):
    broken = tmp_path / "libmoacompress_cpu.so"
    monkeypatch.setattr(library, "LIBRARY", broken)
    assert library._load.__wrapped__().reason.startswith("the extension is not built")
    broken.write_bytes(b"not a library")
    found = library._load.__wrapped__()
    assert found.isa is None
    assert found.reason.startswith("libmoacompress_cpu.so cannot be loaded")


def test_the_environment_chooses_the_instruction_set(isa, monkeypatch):
    for name in ("portable", library.ISAS[0]):
        monkeypatch.setenv(library.ISA_VARIABLE, name)
        assert library._load.__wrapped__().isa == name
    monkeypatch.setenv(library.ISA_VARIABLE, "sse9")
    with pytest.raises(UsageError, match=f"MOACOMPRESS_ISA is 'sse9', not one of {', '.join(library.ISAS)}"):
        library._load.__wrapped__()


def test_a_gpu_runs_on_triton_where_it_works(from_scratch, monkeypatch):
    """Whatever the processor runs on."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "chosen", lambda: Choice("cpu", "avx2", "built"))
    for works in (True, False):
        dispatch._name_for.cache_clear()
        monkeypatch.setattr(TritonBackend, "status", lambda _, works=works: Status(works, "a reason"))
        plain = next(each.name for each in dispatch.backends() if each.supports("meta", torch.float64))
        assert dispatch._name_for("cuda", torch.bfloat16) == ("triton" if works else plain)
        assert dispatch._name_for("cuda", torch.float64) == plain
        assert dispatch._name_for("cpu", torch.bfloat16) == "cpu"
