"""The model of what bounds a step on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"
ASSEMBLY = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0030*/                   ISETP.GE.AND P0, PT, R2, R3, PT ;
        /*0040*/              @!P0 BRA 0x10 ;
        /*0050*/                   EXIT ;
        /*0060*/                   BRA 0x60 ;
"""


@pytest.fixture
def roofline(triton, monkeypatch):  # kernels are the interpreter's from when they are imported first
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_roofline

    return gpu_roofline


def test_the_loop_is_found(roofline):
    """From where it jumps back to, the jump included; what stands still behind the end is none."""
    assert roofline.loop_instructions(ASSEMBLY) == 4
    with pytest.raises(ValueError, match="no loop"):
        roofline.loop_instructions(ASSEMBLY.replace("BRA 0x10", "BRA 0x50"))


def test_the_least_bound_counts(roofline):
    card = roofline.Card("one", processors=10, bandwidth=1e12, clock=1e9, products=1e14)
    kernel = roofline.Kernel(tile=64, tile_bytes=64 * 512, stages=3, warps=4, at_once=2, instructions=500)
    found = roofline.bounds(card, kernel)
    assert found["bandwidth"] == pytest.approx(0.9e12)
    assert found["in flight"] == pytest.approx(10 * 2 * 2 * 64 * 512 / 700e-9)
    assert found["issue"] == pytest.approx(10 * 1e9 * 4 / (500 * 4) * 64 * 512)
    few = roofline.bounds(card, kernel, programs=5)
    assert few["in flight"] == pytest.approx(found["in flight"] / 4)
    assert few["issue"] == pytest.approx(found["issue"] / 2)
    seconds, least = roofline.attention_seconds(card, kernel, 8, 4096)
    assert least == min(found, key=found.get)
    assert seconds == pytest.approx(32 * 8 * 8 * 4096 * 512 / found[least])
    assert roofline.weights_seconds(card, 1) == pytest.approx(15e9 / 0.9e12)
    assert roofline.weights_seconds(card, 640) == pytest.approx(15e9 * 640 / 1e14)
    assert [roofline.token_bytes(pair) for pair in ((0, 0), (8, 8), (8, 4))] == [512, 264, 200]


@pytest.mark.builds("triton")
def test_codes_are_worth_their_bytes_in_the_model():
    """On an H100 no pair of formats is bound by instructions so much that fewer bytes are not faster."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [
            sys.executable,
            BENCHMARKS / "gpu_roofline.py",
            "--cards",
            "sm_90",
            "--rows",
            "8",
            "--lengths",
            "32768",
            "--json",
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "TRITON_DEFAULT_FP_FUSION": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    speeds = {row["bits"]: row["tokens, x 16/16"] for row in found["kernels"]}
    assert speeds["8/8"] >= 1.7
    assert speeds["8/4"] >= 2.1
    assert speeds["4/4"] >= 2.5
    assert len(found["steps"]) == 1
