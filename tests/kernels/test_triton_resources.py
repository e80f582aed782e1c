"""The Triton kernels, compiled for cards that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "triton_resources.py"


def resources(cards: str, dims: str, kernel: str) -> list[dict[str, object]]:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--cards", cards, "--dims", dims, "--kernels", kernel, "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "TRITON_DEFAULT_FP_FUSION": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)[kernel]


@pytest.mark.builds("triton")
def test_what_they_take():
    """No spills; reads of 16 bytes, ahead of use; and several programs to a processor."""
    rows = resources("sm_80,sm_90,sm_100,gfx942", "64,128", "decode")
    assert len(rows) == 4 * 2 * 4
    for row in rows:
        assert row["spilled"] == 0, row
        if row["card"] == "gfx942":
            assert row["read"] > 0 or row["bits"] == "4/4", row
        else:
            assert row["ahead"] >= 4, row
            assert row["at once"] >= 3, row


@pytest.mark.builds("triton")
def test_what_those_take_that_round():
    """No spills, many programs to a processor, and nothing that rounds otherwise than docs/formats.md says."""
    for row in resources("sm_80,sm_90,sm_100,gfx942", "96,128,256", "append"):
        assert row["spilled"] == 0, row
        assert not row["inexact"], row
        assert row["card"] == "gfx942" or row["at once"] >= 24, row


@pytest.mark.builds("triton")
def test_what_a_step_in_rings_takes():
    """As without rings, and as much where scores are kept for layers that share attention, or read."""
    cards = "sm_80,sm_90,sm_100,gfx942"
    for kernel, ahead, at_once in (("ring-decode", 4, 3), ("ring-keep", 4, 2), ("ring-reuse", 2, 2)):
        for row in resources(cards, "64,128", kernel):
            assert row["spilled"] == 0, row
            assert row["card"] == "gfx942" or (row["ahead"] >= ahead and row["at once"] >= at_once), row
    for kernel in ("ring-append", "ring-select"):
        for row in resources(cards, "128", kernel):
            assert row["spilled"] == 0, row
            assert not row.get("inexact"), row


@pytest.mark.builds("triton")
def test_what_selecting_takes():
    """No spills, and several programs to a processor."""
    for row in resources("sm_80,sm_90,sm_100,gfx942", "128", "select"):
        assert row["spilled"] == 0, row
        assert row["card"] == "gfx942" or row["at once"] >= 8, row


@pytest.mark.builds("triton")
def test_what_the_profile_takes():
    """No spills, and reads of 16 bytes ahead of use."""
    rows = resources("sm_80,sm_90,sm_100", "64,128", "profile")
    assert len(rows) == 6
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["ahead"] >= 8, row


@pytest.mark.builds("triton")
@pytest.mark.parametrize("kernel", ["gradients-q", "gradients-kv"])
def test_what_gradients_take(kernel):
    """No spills, reads of 16 bytes ahead of use, and two programs to a processor."""
    for row in resources("sm_80,sm_90,sm_100,gfx942", "64,128", kernel):
        assert row["spilled"] == 0, row
        assert row["card"] == "gfx942" or (row["ahead"] >= 8 and row["at once"] >= 2), row


def test_what_chunks_take():
    """No spills, and reads of 16 bytes ahead of use."""
    for row in resources("sm_80,sm_90,sm_100", "64,128", "prefill"):
        assert row["spilled"] == 0, row
        assert row["ahead"] >= 8, row
        assert row["at once"] >= 2, row


@pytest.mark.heavy
@pytest.mark.parametrize(("cards", "dims"), [("sm_80,sm_90,sm_100", "256"), ("gfx942", "64,128")])
def test_what_chunks_of_large_heads_and_of_other_cards_take(cards, dims):
    for row in resources(cards, dims, "prefill"):
        assert row["spilled"] == 0, row


@pytest.mark.heavy
def test_what_large_heads_take():
    for row in resources("sm_80,sm_90,sm_100", "256", "decode"):
        assert row["spilled"] == 0, row
        assert row["ahead"] >= 4, row
        assert row["at once"] >= 2, row
