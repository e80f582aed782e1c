"""Which kernel runs, why, and what happens where the wish and the machine do not fit."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moacompress.core.errors import UnsupportedError, UsageError
from moacompress.kernels import cpu_ops, dispatch
from moacompress.kernels.cpu_ops import Built
from moacompress.kernels.dispatch import Choice, choose

NOT_BUILT = Built(None, "the extension is not built")


def test_the_best_there_is():
    assert choose(None, Built("avx2")) == Choice("cpu", "avx2", "the extension is built for this machine")
    assert choose("", NOT_BUILT) == Choice("reference", None, "the extension is not built")


def test_what_is_asked_for():
    assert choose("reference", Built("avx2")).name == "reference"
    assert choose("cpu", Built("avx2")) == Choice("cpu", "avx2", "MOACOMPRESS_KERNEL asks for it", asked=True)
    with pytest.raises(
        UnsupportedError, match="asks for the kernel 'cpu', which cannot run: the extension is not built"
    ):
        choose("cpu", NOT_BUILT)
    with pytest.raises(UsageError, match="MOACOMPRESS_KERNEL is 'fast', not one of cpu, reference"):
        choose("fast", Built("avx2"))


def test_it_is_said_once(caplog, monkeypatch):
    dispatch.chosen.cache_clear()
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    with caplog.at_level(logging.INFO, logger="moacompress"):
        dispatch.chosen()
        dispatch.chosen()
    assert [record.getMessage() for record in caplog.records] == ["kernel: reference (MOACOMPRESS_KERNEL asks for it)"]
    dispatch.chosen.cache_clear()


def test_other_dtypes_run_on_the_reference_unless_the_kernel_is_asked_for(monkeypatch):
    double = torch.zeros(1, 1, 1, dtype=torch.float64)
    monkeypatch.setattr(dispatch, "chosen", lambda: Choice("cpu", "avx2", "built"))
    assert dispatch.kernel_for(double) == "reference"
    assert dispatch.kernel_for(double.to(torch.bfloat16)) == "cpu"
    assert dispatch.kernel_for(double.float().to("meta")) == "reference"
    monkeypatch.setattr(dispatch, "chosen", lambda: Choice("cpu", "avx2", "asked", asked=True))
    with pytest.raises(UnsupportedError, match="MOACOMPRESS_KERNEL=cpu cannot run torch.float64 on cpu"):
        dispatch.kernel_for(double)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_kernels_through_the_same_door(dtype, random_case, close, monkeypatch):
    case = random_case(8, torch.float32, rows=2, past=100, tokens=20, logits=True).to(dtype)
    expected = (dispatch.reference_decode, case.decode), (dispatch.reference_prefill, case.prefill)
    for name in dispatch.KERNELS:
        monkeypatch.setattr(dispatch, "chosen", lambda name=name: Choice(name, None, ""))
        if name == "cpu" and cpu_ops.load().isa is None:
            continue
        for run, (reference, arguments) in zip((dispatch.decode, dispatch.prefill), expected, strict=True):
            exact = case.to(torch.float64)
            wanted = reference(*(exact.decode if run is dispatch.decode else exact.prefill))
            close(run(*arguments), wanted, dtype)


def test_why_it_is_not_built(tmp_path: Path):
    nothing = cpu_ops.missing({"PATH": str(tmp_path)})
    assert nothing == (
        "the extension is not built and no C++ compiler is found (c++, g++, clang++); install one, then reinstall"
    )
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    assert cpu_ops.missing({"PATH": str(tmp_path)}).startswith(
        "the extension is not built; g++ is here, so `pip install"
    )
    assert "(my-c++)" in cpu_ops.missing({"PATH": str(tmp_path), "CXX": "my-c++ -O1"})


def test_a_library_that_cannot_be_loaded(tmp_path: Path, monkeypatch):
    broken = tmp_path / "libmoacompress_cpu.so"
    monkeypatch.setattr(cpu_ops, "LIBRARY", broken)
    assert (cpu_ops.load.__wrapped__().reason or "").startswith("the extension is not built")
    broken.write_bytes(b"not a library")
    found = cpu_ops.load.__wrapped__()
    assert found.isa is None
    assert (found.reason or "").startswith("libmoacompress_cpu.so cannot be loaded")


def test_instruction_sets(isa):
    with pytest.raises(UsageError, match="MOACOMPRESS_ISA is 'sse9', not one of portable, avx2, avx512, avx512_bf16"):
        cpu_ops.set_isa("sse9")


@pytest.mark.parametrize(("name", "printed"), [("portable", "portable"), ("sse9", "MOACOMPRESS_ISA is 'sse9'")])
def test_the_environment_chooses_the_instruction_set(name, printed, isa):
    code = """
from moacompress.core.errors import MoaCompressError
from moacompress.kernels import cpu_ops
try:
    print(cpu_ops.load().isa)
except MoaCompressError as error:
    print(error)
"""
    root = str(Path(cpu_ops.__file__).parents[2])
    environment = {**os.environ, cpu_ops.ISA_VARIABLE: name, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip().startswith(printed)
