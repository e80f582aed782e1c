"""The Triton kernels, compiled for cards that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from moacompress.kernels.triton.cards import CARDS, OTHER, Card, card_of
from moacompress.kernels.triton.tile_sizes import prefill_tiles

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "triton_resources.py"
COMPILED = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
"""Cards that kernels are compiled for."""
LEAST = {**CARDS, "sm_80": CARDS["sm_86"]}
"""Cards with the least shared memory of those that have the same tiles and instructions."""


class Bounds(NamedTuple):
    """What a compiled kernel holds to, in bfloat16 with four query heads to a KV head.

    Attributes:
        registers: most of a thread on each of `COMPILED`.
        at_once: least programs of a processor on NVIDIA's cards; 2 where there is little shared memory.
        ahead: least reads of 16 bytes ahead of use there.
        dims: numbers of a head.
    """

    registers: tuple[int, int, int, int, int]
    at_once: int
    ahead: int = 0
    dims: str = "64,128"


BOUNDS = {
    "decode": Bounds((248, 240, 184, 184, 256), 3, 8),
    "merge": Bounds((48, 48, 40, 48, 48), 10),
    "append": Bounds((72, 72, 72, 80, 48), 24, dims="64,96,128,256"),
    "select": Bounds((56, 40, 40, 56, 32), 9),
    "move": Bounds((32, 32, 32, 32, 16), 16),
    "prefill": Bounds((255, 255, 255, 255, 312), 2, 8),
    "ring-decode": Bounds((255, 255, 255, 248, 264), 3, 8),
    "ring-keep": Bounds((255, 255, 255, 224, 280), 2, 8),
    "ring-reuse": Bounds((168, 184, 152, 144, 128), 2, 2),
    "ring-append": Bounds((56, 56, 56, 56, 24), 24),
    "ring-select": Bounds((56, 40, 40, 40, 32), 9),
}
FLOAT32, LARGE_FLOAT32 = "float32", "float32, heads of 256"
SPILLS = {
    ("prefill-careful", "sm_90", ""): 416,
    ("ring-select", "sm_90", ""): 8,
    ("ring-select", "sm_100", ""): 8,
    ("ring-decode", "sm_90", "heads of 32"): 24,
    ("ring-keep", "sm_90", "heads of 32"): 32,
    ("prefill", "sm_90", FLOAT32): 8,
    ("prefill", "sm_90", LARGE_FLOAT32): 336,
    ("decode", "sm_90", LARGE_FLOAT32): 232,
}
"""Most bytes of registers that do not fit, by kernel, card and model ("" for those of `BOUNDS`); nothing else spills."""
ATTENTION = "prefill,decode"
MODELS = {
    "heads of 32": (",".join(BOUNDS), "--dims", "32"),
    "heads of 96": (",".join(BOUNDS), "--dims", "96"),
    "heads of 256": (",".join(BOUNDS), "--dims", "256"),
    "float16": (ATTENTION, "--dims", "128", "--dtype", "fp16"),
    FLOAT32: (ATTENTION, "--dims", "64,128", "--dtype", "fp32"),
    LARGE_FLOAT32: (ATTENTION, "--dims", "256", "--dtype", "fp32"),
    "groups of 1": (ATTENTION, "--dims", "128", "--group", "1"),
    "groups of 8": (ATTENTION, "--dims", "128", "--group", "8"),
    "groups of 16": (ATTENTION, "--dims", "128", "--group", "16"),
    "bounds and logits": (ATTENTION, "--dims", "128", "--bounded"),
}
"""Other heads, groups, dtypes and scores, and the kernels that are compiled for them."""


def resources(*arguments: str) -> dict[str, list[dict[str, Any]]]:
    """Returns rows by kernel."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments, "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "TRITON_DEFAULT_FP_FUSION": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def check(kernel: str, row: dict[str, Any], model: str = "") -> None:
    """It fits the card, and nothing but `SPILLS` has spilled; what rounds to the bit is not contracted."""
    assert row["shared"] <= LEAST[row["card"]].shared, (kernel, row)
    assert row["spilled"] <= SPILLS.get((kernel, row["card"], model), 0), (kernel, row)
    assert not row.get("inexact"), (kernel, row)


@pytest.mark.builds("triton")
@pytest.mark.parametrize("kernel", BOUNDS)
def test_what_a_kernel_takes(kernel: str) -> None:
    """Few enough registers, several programs to a processor, and reads of 16 bytes; ahead of use where the card can."""
    bounds = BOUNDS[kernel]
    most = dict(zip(COMPILED, bounds.registers, strict=True))
    rows = resources("--cards", ",".join(COMPILED), "--dims", bounds.dims, "--kernels", kernel)[kernel]
    assert {row["card"] for row in rows} == set(COMPILED)
    for row in rows:
        check(kernel, row)
        assert row["registers"] <= most[row["card"]], row
        if row["card"].startswith("sm_"):
            assert row["at once"] >= (2 if row["card"] == "sm_120" else bounds.at_once), row
            assert row.get("ahead", 0) >= bounds.ahead, row
        elif bounds.ahead:
            assert row["read"] > 0 or row["bits"].endswith("/4"), row


@pytest.mark.heavy
@pytest.mark.parametrize("model", MODELS)
def test_what_other_models_take(model: str) -> None:
    """They fit, in two pairs of formats, on cards with the largest tiles and with the least shared memory."""
    kernels, *rest = MODELS[model]
    found = resources("--cards", "sm_90,gfx942", "--bits", "16/16,8/4", "--kernels", kernels, *rest)
    for kernel, rows in found.items():
        for row in rows:
            check(kernel, row, model)


@pytest.mark.heavy
@pytest.mark.parametrize("kernel", ["prefill-first", "prefill-careful"])
def test_what_prompts_and_second_launches_take(kernel: str) -> None:
    for row in resources("--cards", "sm_90,sm_120,gfx942", "--dims", "64,128", "--kernels", kernel)[kernel]:
        check(kernel, row)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Card]:
    """Returns what the first device is told to be, with this Triton, by a capability or by AMD's name."""
    triton = pytest.importorskip("triton")

    def tell(capability: tuple[int, int], version: str = "3.9.0", amd: str | None = None) -> Card:
        monkeypatch.setattr(triton, "__version__", version)
        monkeypatch.setattr(torch.version, "hip", amd and "7.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=amd))
        card_of.cache_clear()
        found = card_of(torch.device("cuda", 0))
        card_of.cache_clear()
        return found

    return tell


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90"), ((10, 3), "sm_103"), ((12, 0), "sm_120"), ((7, 5), "")],
)
def test_a_card_is_told_by_its_capability(capability: tuple[int, int], name: str, told: Callable[..., Card]) -> None:
    """Consumers' cards of the same generation have less shared memory, and the tiles of older ones."""
    found = told(capability)
    assert found == CARDS.get(name, OTHER)
    tiles, queries = prefill_tiles(128, 128, 2, False, found)
    assert (tiles.TILE, queries) == ((64, 64) if capability[0] in (9, 10) else (32, 32))


def test_an_older_triton_has_smaller_tiles_of_cards_with_tensor_memory(told: Callable[..., Card]) -> None:
    """3.6 fails to compile the larger ones for them."""
    assert told((10, 0), "3.6.0") == CARDS["sm_100"]._replace(large=False)
    assert told((9, 0), "3.6.0") == CARDS["sm_90"]


def test_a_card_of_amd_is_told_by_its_architecture(told: Callable[..., Card]) -> None:
    """Its tiles of a chunk fit 64 KiB."""
    found = told((9, 4), amd="gfx942:sramecc+:xnack-")
    assert found == CARDS["gfx942"]
    assert prefill_tiles(128, 128, 2, False, found)[0].TILE == 32
