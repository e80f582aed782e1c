"""What bounds a decode step on a GPU, as a model: no GPU is needed, and none was measured.

    python benchmarks/gpu_roofline.py --cards sm_80,sm_90,sm_100

The decode kernel is compiled for each card, and three bounds are worked out from what the compiler made of it and from what the
makers say of the cards (`CARDS`): reading the bytes at `REACHED` of the memory's bandwidth; having enough bytes on their way
(the programs that a processor holds, times the tiles that each reads ahead, must cover the memory's latency); and issuing the
instructions of the loop over tiles, four a cycle and processor. The first table says what each allows a KV head's blocks, and
which is the least. The second is a step of a model of 8 billion numbers (32 layers of 8 KV heads, 4 query heads to each, 128
numbers, bfloat16): its weights read once, and attention to full span in bfloat16, or to a share of the tokens in a format. What
starts kernels, writes, merges and samples is not in it.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from harness import options, rows_table  # beside this script
from triton_resources import PAIRS, Model, decode_resources, split_compiled  # beside this script

from moacompress.kernels.triton.work_lists import LONGEST, PROGRAMS
from moacompress.rules.formats import FORMATS
from moacompress.rules.windows import BLOCK

REACHED = 0.9
"""Of a memory's bandwidth that the best kernels reach."""
LATENCY = 700e-9
"""Of a card's memory under load, s; an assumption."""
SCHEDULERS = 4
"""Instructions that a processor issues in a cycle, of one warp each."""
DIM = 128
LAYERS, KV_HEADS = 32, 8
READ_NUMBERS = 7.5e9
"""Numbers of the weights that a step reads: all but the table of embeddings."""


class Card(NamedTuple):
    """What the maker says of a card.

    Attributes:
        name: of it.
        processors: streaming multiprocessors.
        bandwidth: of its memory, bytes/s.
        clock: of the processors, 1/s.
        products: of bfloat16 with sums in float32, dense, operations/s.
    """

    name: str
    processors: int
    bandwidth: float
    clock: float
    products: float


CARDS = {
    "sm_80": Card("A100 SXM 80 GB", 108, 2.04e12, 1.41e9, 312e12),
    "sm_90": Card("H100 SXM", 132, 3.35e12, 1.83e9, 989e12),
    "sm_100": Card("B200", 148, 8.0e12, 1.85e9, 2250e12),
}


class Kernel(NamedTuple):
    """A compiled decode kernel.

    Attributes:
        tile: tokens that are attended to at once.
        tile_bytes: that are read for them, of a KV head.
        stages: tiles that are read ahead, the one in use included.
        warps: of a program.
        at_once: programs that a processor holds.
        instructions: of the loop over tiles, of each warp.
    """

    tile: int
    tile_bytes: int
    stages: int
    warps: int
    at_once: int
    instructions: int


def loop_instructions(assembly: str) -> int:
    """Returns the instructions of the longest loop in what `cuobjdump --dump-sass` writes.

    Raises:
        ValueError: there is no loop.
    """
    lines = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", assembly)]
    loops = [
        (int(to.group(1), 16), at)
        for at, what in lines
        if (to := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", what)) and int(to.group(1), 16) < at
    ]
    if not loops:
        raise ValueError("there is no loop in the assembly")
    return max(sum(begin <= at <= end for at, _ in lines) for begin, end in loops)


def kernel_of(card: str, bits: tuple[int, int]) -> Kernel:
    """Compiles the decode kernel for a card and a pair of formats."""
    tiles, found = split_compiled(card, Model(DIM), bits)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(found.asm["cubin"])
        said = subprocess.run([tool, "--dump-sass", binary], capture_output=True, text=True, check=True).stdout
    at_once = decode_resources(card, Model(DIM), bits)["at once"]
    tile_bytes = tiles.TILE * token_bytes(bits)
    return Kernel(tiles.TILE, tile_bytes, tiles.num_stages, tiles.num_warps, at_once, loop_instructions(said))


def token_bytes(bits: tuple[int, int]) -> int:
    """Returns the bytes of a token of a KV head."""
    formats = [next(each for each in FORMATS.values() if each.bits == side) for side in bits]
    return sum(each.vector_bytes(DIM, "bfloat16") for each in formats)


def bounds(card: Card, kernel: Kernel, programs: float = float("inf")) -> dict[str, float]:
    """Returns the bytes/s that each bound allows attention.

    `programs` are there to be run, at once or one after the other.
    """
    held = min(programs, card.processors * kernel.at_once)
    tiles = card.processors * card.clock * SCHEDULERS / (kernel.instructions * kernel.warps)
    # a processor without a program issues nothing
    busy = min(1.0, programs / card.processors)
    return {
        "bandwidth": card.bandwidth * REACHED,
        "in flight": held * (kernel.stages - 1) * kernel.tile_bytes / LATENCY,
        "issue": tiles * busy * kernel.tile_bytes,
    }


def attention_seconds(card: Card, kernel: Kernel, rows: int, tokens: int) -> tuple[float, str]:
    """Returns how long attention of a step's layers takes at least, s, at so many kept tokens, and what bounds it."""
    heads, per_token = rows * KV_HEADS, kernel.tile_bytes / kernel.tile
    share = max(1.0, min(LONGEST * BLOCK, heads * tokens / PROGRAMS))
    programs = heads * max(1.0, tokens / share)
    found = bounds(card, kernel, programs)
    least = min(found, key=lambda name: found[name])
    return LAYERS * heads * tokens * per_token / found[least], least


def weights_seconds(card: Card, rows: int) -> float:
    """Returns how long a step's products with weights take at least, s."""
    return max(2 * READ_NUMBERS / (card.bandwidth * REACHED), 2 * READ_NUMBERS * rows / card.products)


def main() -> None:
    """Prints the tables, or one JSON object."""
    parser = options(__doc__)
    parser.add_argument("--cards", default=",".join(CARDS), help=f"some of {', '.join(CARDS)}, with commas")
    parser.add_argument("--rows", default="1,8,64", help="of the batch, with commas")
    parser.add_argument("--lengths", default="4096,32768,131072", help="tokens, with commas")
    parser.add_argument("--plans", default="0.25:16/16,0.25:8/4", help="share of the tokens and bits, with commas")
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    given = parser.parse_args()
    tables: dict[str, list[dict[str, Any]]] = {"kernels": [], "steps": []}
    for name in given.cards.split(","):
        card = CARDS[name]
        kernels = {"/".join(str(one or 16) for one in bits): kernel_of(name, bits) for bits in PAIRS}
        for bits, kernel in kernels.items():
            found = bounds(card, kernel)
            least = min(found, key=lambda bound: found[bound])
            row = {"card": card.name, "bits": bits, "instructions": kernel.instructions}
            row |= {f"{bound}, TB/s": round(value / 1e12, 2) for bound, value in found.items()}
            tokens = found[least] / token_bytes(_bits(bits))
            native = bounds(card, kernels["16/16"])
            row |= {"bound by": least, "tokens, x 16/16": round(tokens * token_bytes((0, 0)) / min(native.values()), 2)}
            tables["kernels"].append(row)
        for rows in map(int, given.rows.split(",")):
            for length in map(int, given.lengths.split(",")):
                tables["steps"].append(_step(card, kernels, rows, length, given.plans.split(",")))
    if given.json:
        print(json.dumps(tables))
        return
    for title, rows_of in tables.items():
        print(f"{title}:\n\n{rows_table(rows_of)}\n")


def _step(card: Card, kernels: dict[str, Kernel], rows: int, length: int, plans: list[str]) -> dict[str, Any]:
    """Returns a row of the table of steps: milliseconds with full span and under plans."""
    weights = weights_seconds(card, rows)
    full, bound = attention_seconds(card, kernels["16/16"], rows, length)
    found: dict[str, Any] = {"card": card.name, "rows": rows, "length": length, "weights, ms": round(weights * 1e3, 2)}
    found["full span, ms"] = f"{(weights + full) * 1e3:.2f} ({bound})"
    for plan in plans:
        share, bits = plan.split(":")
        seconds, bound = attention_seconds(card, kernels[bits], rows, int(float(share) * length))
        ratio = (weights + full) / (weights + seconds)
        found[f"{share} at {bits}, ms"] = f"{(weights + seconds) * 1e3:.2f} ({bound}), {ratio:.2f} x"
    return found


def _bits(named: str) -> tuple[int, int]:
    """Returns bits of keys and values, 0 for native numbers."""
    key, value = (int(each) % 16 for each in named.split("/"))
    return key, value


if __name__ == "__main__":
    main()
