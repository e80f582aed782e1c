"""What the Triton kernels take of a GPU, compiled ahead of time: no GPU is needed, and nothing is said of speed.

    python benchmarks/triton_resources.py --cards sm_80,sm_90,sm_100,gfx942 --dims 64,128,256

Each decode kernel is compiled as the backend would have it, for models in bfloat16 with four query heads to a KV head. A row
says how many registers a thread has and how many bytes of them it had to spill; how much shared memory a program has; how many
programs a processor holds at once by either (`at once`); and how many reads of 16 bytes the loop over tiles issues, ahead of
use where the card can (`ahead`).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moacompress.kernels.triton import decode_kernels
from moacompress.kernels.triton.tile_sizes import split_constants

REGISTERS = 65536
"""Of a processor of the NVIDIA cards here."""
SHARED = {"sm_80": 164, "sm_90": 228, "sm_100": 228}
"""KiB of shared memory of a processor."""
GROUP = 4
"""Query heads of a KV head."""
PAIRS = ((0, 0), (8, 8), (8, 4), (4, 4))
"""Bits of keys and values; 0 for the model's own numbers."""
POINTERS = {
    "Query": "*bf16",
    "KeyPlaces": "*i64",
    "ValuePlaces": "*i64",
    "Table": "*i64",
    "Lengths": "*i64",
    "Rules": "*i64",
    "Work": "*i64",
    "Partial": "*fp32",
    "PartialLse": "*fp32",
}
NUMBERS = {"scaling": "fp32", "softcap": "fp32", "kv_heads": "i32", "width": "i32", "chunk": "i32"}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", default="sm_80,sm_90,sm_100", help="sm_80, sm_90, sm_100 or gfx942, with commas")
    parser.add_argument("--dims", default="64,128,256", help="numbers of a key and of a value, with commas")
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    given = parser.parse_args()
    rows = [
        decode_resources(card, int(dim), pair)
        for card in given.cards.split(",")
        for dim in given.dims.split(",")
        for pair in PAIRS
    ]
    if given.json:
        print(json.dumps({"decode": rows}))
        return
    names = list(rows[0])
    print("| " + " | ".join(names) + " |")
    print("|" + " --- |" * len(names))
    for row in rows:
        print("| " + " | ".join("" if row[name] is None else str(row[name]) for name in names) + " |")


def decode_resources(card: str, dim: int, bits: tuple[int, int]) -> dict[str, Any]:
    """Compiles the decode kernel for a card; returns what it takes."""
    key_bits, value_bits = bits
    tiles, constants = split_constants(GROUP, dim, dim, bits, softcap=False, wide=False, item_size=2)
    pools = {"Keys": "*u8" if key_bits else "*bf16", "Values": "*u8" if value_bits else "*bf16"}
    signature = {**POINTERS, **pools, **NUMBERS, **dict.fromkeys(constants, "constexpr")}
    places = {name: (at,) for at, name in enumerate(decode_kernels.split.arg_names)}
    aligned = {places[name]: [["tt.divisibility", 16]] for name in (*POINTERS, *pools)}
    source = ASTSource(
        decode_kernels.split,
        {name: signature[name] for name in places},
        {places[name]: value for name, value in constants.items()},
        aligned,
    )
    amd = card.startswith("gfx")
    target = GPUTarget("hip", card, 64) if amd else GPUTarget("cuda", int(card.removeprefix("sm_")), 32)
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    found = triton.compile(source, target=target, options=options)
    counts = _amd(found.asm["amdgcn"]) if amd else _nvidia(found)
    shared = found.metadata.shared
    at_once = None
    if not amd:
        by_registers = REGISTERS // (counts["registers"] * 32 * tiles.num_warps)
        at_once = min(by_registers, SHARED[card] * 1024 // max(shared, 1))
    named = "/".join(str(number or 16) for number in bits)
    return {"card": card, "dim": dim, "bits": named, "tile": tiles.TILE, **counts, "shared": shared, "at once": at_once}


def _nvidia(compiled: Any) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        said = subprocess.run(
            [tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True
        ).stdout
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    ahead = len(re.findall(r"cp\.async\.c[ga]\.shared\.global[^;]*?, (?:0x10|16)\b", compiled.asm["ptx"]))
    read = len(re.findall(r"ld\.global[^;]*\.v4\.b32|ld\.global[^;]*\.v2\.b64", compiled.asm["ptx"]))
    return {"registers": numbers["REG"], "spilled": numbers["STACK"] + numbers["LOCAL"], "ahead": ahead, "read": read}


def _amd(text: str) -> dict[str, int]:
    registers, spilled = (
        int(re.findall(pattern, text)[-1]) for pattern in (r"\.vgpr_count:\s*(\d+)", r"\.vgpr_spill_count:\s*(\d+)")
    )
    read = len(re.findall(r"(?:global|buffer|flat)_load_dwordx4", text))
    return {"registers": registers, "spilled": spilled, "ahead": 0, "read": read}


if __name__ == "__main__":
    main()
