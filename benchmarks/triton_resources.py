"""What the Triton kernels take of a GPU, compiled ahead of time: no GPU is needed, and nothing is said of speed.

    python benchmarks/triton_resources.py --cards sm_80,sm_90,sm_100,gfx942 --dims 64,128,256

Each kernel is compiled as the backend would have it, for models in bfloat16 with four query heads to a KV head, or for others
(`--dtype`, `--group`, `--bounded`). A row says how many registers a thread has and how many bytes of them it had to spill;
how much shared memory a program has; and how many programs a processor holds at once by either (`at once`). Of those that
attend, how many reads of 16 bytes the loops over tiles issue, ahead of use where the card can (`ahead`). `ring-keep` keeps its
scores for layers that share the attention, and `ring-reuse` reads them in place of keys; `merge` adds up parts.
`prefill-first` is that of a prompt without a past, and `prefill-careful` that of programs with numbers that are not finite. Of
`append`, which rounds to the bit, how many operations are contracted, or not rounded to nearest (`inexact`). `select` lets a
token compete that leaves a window, and `move` copies tokens.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from harness import options, rows_table  # beside this script
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moacompress.kernels.kv_parts import KVPart
from moacompress.kernels.triton import append_kernels, decode_kernels, prefill_kernels, select_kernels
from moacompress.kernels.triton.cards import CARDS, named
from moacompress.kernels.triton.tile_sizes import (
    APPEND_WARPS,
    MERGE_WARPS,
    SELECT_WARPS,
    append_constants,
    append_next_constants,
    merge_constants,
    move_constants,
    prefill_constants,
    select_constants,
    split_constants,
)
from moacompress.rules.formats import FORMATS

REGISTERS = 65536
"""Of a processor of the NVIDIA cards here."""
SHARED = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90": 228, "sm_100": 228, "sm_120": 100}
"""KiB of shared memory of a processor."""
PROGRAMS = 32
"""Most that a processor of these cards holds."""
GROUP = 4
"""Query heads of a KV head."""
PAIRS = ((0, 0), (8, 8), (8, 4), (4, 4))
"""Bits of keys and values; 0 for the model's own numbers."""
REUSED = "-"
"""Bits of keys that are not read."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Of models."""
OF_MODEL = ("Query", "Key", "Value", "ChunkKeys", "ChunkValues", "SinkLogits", "Out")
"""Pointers to numbers of the model's dtype."""
POINTERS = {**dict.fromkeys(("Partial", "PartialLse", "Lse", "Kept"), "*fp32"), "Suspect": "*i32"}
"""Types of pointers that are not to integers of 64 bits."""
FLOATS = ("scaling", "softcap")
IN_RING = {"Table": "*i32", "Selected": "*i32", "GateScores": "*i16"}
"""Types of pointers of the kernels of a step in rings."""
OF_GATES = {"Kept": "*i16"}
"""Types of pointers of the kernels that write and compare scores of tokens."""
NATIVE = ("merge", "prefill-first")
"""Kernels that formats are no matter of."""


class Model(NamedTuple):
    """What kernels are compiled for beside formats.

    Attributes:
        dim: numbers of a key and of a value.
        group: query heads of a KV head.
        dtype: one of `DTYPES`.
        bounded: whether scores are bounded by tanh, and there are learned logits.
    """

    dim: int
    group: int = GROUP
    dtype: str = "bf16"
    bounded: bool = False

    @property
    def sides(self) -> tuple[int, int, int]:
        """Query heads of a KV head, and numbers of a key and of a value."""
        return self.group, self.dim, self.dim

    @property
    def products(self) -> dict[str, Any]:
        """What the constants of attention depend on beside those."""
        wide = self.dtype == "fp32"
        return {"softcap": self.bounded, "wide": wide, "item_size": DTYPES[self.dtype].itemsize}


def main() -> None:
    """Runs the benchmark."""
    resources: dict[str, Callable[[str, Model, tuple[int, int]], dict[str, Any]]] = {
        "decode": decode_resources,
        "merge": merge_resources,
        "append": append_resources,
        "select": select_resources,
        "move": move_resources,
        "prefill": prefill_resources,
        "prefill-first": partial(prefill_resources, cached=False),
        "prefill-careful": partial(prefill_resources, careful=True),
        "ring-decode": partial(decode_resources, ring=True),
        "ring-keep": partial(decode_resources, ring=True, keep=True),
        "ring-reuse": partial(decode_resources, ring=True, reuse=True),
        "ring-append": partial(append_resources, ring=True),
        "ring-select": partial(select_resources, ring=True),
    }
    parser = options(__doc__)
    parser.add_argument("--cards", default="sm_80,sm_90,sm_100", help=f"some of {', '.join(CARDS)}, with commas")
    parser.add_argument("--dims", default="64,128,256", help="numbers of a key and of a value, with commas")
    parser.add_argument("--kernels", default=",".join(resources), help="which, with commas")
    parser.add_argument("--bits", help="of keys and values, as 16/16,8/4; all pairs that a kernel has unless given")
    parser.add_argument("--group", type=int, default=GROUP, help="query heads of a KV head")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the model")
    parser.add_argument("--bounded", action="store_true", help="bounds of scores by tanh, and learned logits")
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    given = parser.parse_args()
    pairs = {"ring-reuse": PAIRS[:3], **dict.fromkeys(NATIVE, PAIRS[:1])}
    found = {
        kernel: [
            {"card": card, "dim": dim, "bits": bits_of(pair, reused=kernel == "ring-reuse")}
            | resources[kernel](card, Model(int(dim), given.group, given.dtype, given.bounded), pair)
            for card in given.cards.split(",")
            for dim in given.dims.split(",")
            for pair in pairs.get(kernel, PAIRS)
            if given.bits is None or bits_of(pair, reused=False) in given.bits.split(",")
        ]
        for kernel in given.kernels.split(",")
    }
    if given.json:
        print(json.dumps(found))
        return
    for kernel, rows in found.items():
        print(f"{kernel}:\n\n{rows_table(rows)}\n")


def bits_of(pair: tuple[int, int], *, reused: bool) -> str:
    """Returns the bits of keys and values as a row has them."""
    key, value = (str(bits or 16) for bits in pair)
    return f"{REUSED if reused else key}/{value}"


def decode_resources(
    card: str, model: Model, bits: tuple[int, int], *, ring: bool = False, keep: bool = False, reuse: bool = False
) -> dict[str, Any]:
    """Compiles the decode kernel for a card; returns what it takes."""
    bits = (0, bits[1]) if reuse else bits
    tiles, constants = split_constants(
        *model.sides, bits, **model.products, card=named(card), ring=ring, keep=keep, reuse=reuse
    )
    types = pool_types(model, bits) | (IN_RING if ring else {})
    found = compiled(card, decode_kernels.split, constants, types, tiles.options)
    return {"tile": tiles.TILE, **_taken(card, found, tiles.num_warps)}


def merge_resources(card: str, model: Model, bits: tuple[int, int]) -> dict[str, Any]:
    """Compiles the kernel that adds up parts for a card; returns what it takes."""
    constants = merge_constants(model.group, model.dim, logits=model.bounded)
    found = compiled(card, decode_kernels.merge, constants, pool_types(model, bits), {"num_warps": MERGE_WARPS})
    return _without_reads(_taken(card, found, MERGE_WARPS))


def append_resources(card: str, model: Model, bits: tuple[int, int], *, ring: bool = False) -> dict[str, Any]:
    """Compiles the kernel that writes tokens for a card; returns what it takes, and how many operations are contracted."""
    kernel, constants = append_kernels.append, append_constants(*kv_parts_of(model, bits))
    if ring:
        kernel, constants = append_kernels.append_next, append_next_constants(*kv_parts_of(model, bits), scored=True)
    options = {"num_warps": APPEND_WARPS, "enable_fp_fusion": False}
    found = compiled(card, kernel, constants, pool_types(model, bits) | IN_RING | OF_GATES, options)
    taken = _without_reads(_taken(card, found, APPEND_WARPS))
    inexact = (
        None if card.startswith("gfx") else len(re.findall(r"\b(?:fma|div\.full|div\.approx)\b", found.asm["ptx"]))
    )
    return {**taken, "inexact": inexact}


def select_resources(card: str, model: Model, bits: tuple[int, int], *, ring: bool = False) -> dict[str, Any]:
    """Compiles the kernel that selects tokens for a card; returns what it takes."""
    constants, options = select_constants(*kv_parts_of(model, bits), ring=ring), {"num_warps": SELECT_WARPS}
    types = pool_types(model, bits) | OF_GATES | (IN_RING if ring else {})
    found = compiled(card, select_kernels.select, constants, types, options)
    return _without_reads(_taken(card, found, SELECT_WARPS))


def move_resources(card: str, model: Model, bits: tuple[int, int]) -> dict[str, Any]:
    """Compiles the kernel that copies tokens for a card; returns what it takes."""
    constants, options = move_constants(*kv_parts_of(model, bits)), {"num_warps": SELECT_WARPS}
    found = compiled(card, select_kernels.move, constants, pool_types(model, bits) | OF_GATES, options)
    return _without_reads(_taken(card, found, SELECT_WARPS))


def kv_parts_of(model: Model, bits: tuple[int, int]) -> tuple[KVPart, KVPart]:
    """Returns how keys and values are kept in codes of so many bits."""
    codes, dtype = (
        [next(each.code for each in FORMATS.values() if each.bits == side) for side in bits],
        DTYPES[model.dtype],
    )
    return KVPart(codes[0], model.dim, dtype), KVPart(codes[1], model.dim, dtype, values=True)


def prefill_resources(
    card: str, model: Model, bits: tuple[int, int], *, cached: bool = True, careful: bool = False
) -> dict[str, Any]:
    """Compiles the kernel for chunks, of selected tokens too where there is a past, for a card; returns what it takes."""
    tiles, constants = prefill_constants(
        *model.sides,
        bits,
        **model.products,
        logits=model.bounded,
        cached=cached,
        transient=cached,
        card=named(card),
    )
    types = pool_types(model, bits) | ({"Out": "*fp32"} if bits[1] else {})
    found = compiled(card, prefill_kernels.attend_chunk, {**constants, "CAREFUL": careful}, types, tiles.options)
    return {"tokens": constants["TOKENS"], "tile": tiles.TILE, **_taken(card, found, tiles.num_warps)}


def pool_types(model: Model, bits: tuple[int, int]) -> dict[str, str]:
    """Returns the types of the pointers to keys and values, and to numbers of the model."""
    pools = {name: "*u8" if each else f"*{model.dtype}" for name, each in zip(("Keys", "Values"), bits, strict=True)}
    return dict.fromkeys(OF_MODEL, f"*{model.dtype}") | pools


def compiled(card: str, kernel: Any, constants: dict[str, Any], types: dict[str, str], options: dict[str, Any]) -> Any:
    """Compiles a kernel for a card, as for pointers and strides that are multiples of 16, and for any other integers.

    Constants go by the names of its arguments, and `types` are of pointers.
    """
    places = {name: (at,) for at, name in enumerate(kernel.arg_names)}
    signature, aligned = {}, {}
    for name, place in places.items():
        pointer, stride = name[0].isupper(), name.startswith(("query_", "key_", "value_"))
        number = "fp32" if name in FLOATS else "i32"
        signature[name] = {**POINTERS, **types}.get(name, "*i64") if pointer else number
        if pointer or stride:
            aligned[place] = [["tt.divisibility", 16]]
    signature.update(dict.fromkeys(constants, "constexpr"))
    of_constants = {places[name]: value for name, value in constants.items()}
    source = ASTSource(
        kernel, signature, of_constants, {place: value for place, value in aligned.items() if place not in of_constants}
    )
    amd = card.startswith("gfx")
    target = GPUTarget("hip", card, 64) if amd else GPUTarget("cuda", int(card.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options=options)


def _taken(card: str, found: Any, warps: int) -> dict[str, Any]:
    """Returns what a compiled kernel takes of a card, and `at once`, how many programs a processor holds."""
    shared = found.metadata.shared
    if card.startswith("gfx"):
        return {**_amd(found.asm["amdgcn"]), "shared": shared, "at once": None}
    counts = _nvidia(found)
    by_registers = REGISTERS // (counts["registers"] * 32 * warps)
    at_once = min(by_registers, SHARED[card] * 1024 // max(shared, 1), PROGRAMS)
    return {**counts, "shared": shared, "at once": at_once}


def _without_reads(taken: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in taken.items() if name not in ("ahead", "read")}


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
