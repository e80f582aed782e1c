"""Products with weights in GGML's blocks, beside those with bfloat16 and with torch's own weights of 8 and 4 bits.

    python benchmarks/weight_blocks.py --json

`x` is bfloat16 `[rows, inputs]`. A call takes the next of several copies of its weight, which together are larger than
`--rotate`, so that the last cache does not decide; all ways of a shape and of so many rows take turns. `ms` is the median
time of a call, `gb_s` the bytes of its weight over that time, and `speedup` how many times as fast as `bf16` it is: the
faster of `torch.nn.functional.linear` and of the kernels' product of few rows. `int8` and `int4` are
`torch._weight_int8pack_mm`, with a scale for each output, and `torch._weight_int4pack_mm_for_cpu`, with one for each 32
numbers.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from harness import medians_ms, options  # beside this script
from torch.nn.functional import linear

from moacompress.kernels import dispatch
from moacompress.kernels.backend import Backend
from moacompress.kernels.weight_blocks import WEIGHT_TYPES, WeightType

SHAPES = {
    "SmolLM2 q": (576, 576),
    "SmolLM2 up": (1536, 576),
    "SmolLM2 down": (576, 1536),
    "8B q": (4096, 4096),
    "8B up": (14336, 4096),
    "8B down": (4096, 14336),
}
"""Outputs and inputs of weights, by name."""
SCALES = {"Q4_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Bytes at which a block has float16 numbers; one at its begin where nothing is said."""
Product = Callable[[torch.Tensor], torch.Tensor]


def main() -> None:
    """Runs the benchmark."""
    parser = options(__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="with commas")
    parser.add_argument("--rows", default="1,8,32,256", help="with commas")
    parser.add_argument("--types", default=",".join(WEIGHT_TYPES), help="of blocks, with commas")
    parser.add_argument("--turns", type=int, default=15, help="calls of each way that are timed")
    parser.add_argument("--rotate", type=int, default=512, help="MiB that the copies of a weight take together")
    parser.add_argument("--threads", type=int, help="threads of torch, all cores by default")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    rows = []
    for name in given.shapes.split(","):
        kinds = [WEIGHT_TYPES[kind] for kind in given.types.split(",")]
        ways = weights(*SHAPES[name], kinds, given.rotate << 20)
        for count in map(int, given.rows.split(",")):
            for row in timed(ways, count, SHAPES[name][1], given.turns):
                rows.append({"shape": name, "rows": count, **row})
                if not given.json:
                    print(
                        f"{name:12} {count:4} rows  {row['way']:6} {row['ms']:9.3f} ms {row['gb_s']:7.1f} GB/s "
                        f"{row['speedup']:6.2f}",
                        flush=True,
                    )
    if given.json:
        chosen = dispatch.chosen()
        about = {
            "kernel": chosen.name,
            "isa": chosen.isa,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        print(json.dumps({**about, "rows": rows}))


def in_blocks(kernels: Backend, kind: WeightType, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the product with a weight in blocks."""
    return lambda x: kernels.linear_blocks(x, weight, kind, None)


def weights(
    outputs: int, inputs: int, kinds: Sequence[WeightType], rotate: int
) -> dict[str, tuple[int, list[Product]]]:
    """Returns the bytes of a random weight in each way of keeping it, and products with copies of it, at least `rotate` bytes.

    Types of blocks that are not filled by the inputs are left out.
    """
    found: dict[str, tuple[int, list[Product]]] = {}

    def add(
        name: str, one: Callable[[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]], weight: torch.Tensor
    ) -> None:
        copies = max(1, -(-rotate // weight.nbytes))
        found[name] = weight.nbytes, [one(weight.clone()) for _ in range(copies)]

    plain = (torch.randn(outputs, inputs) / 64).bfloat16()
    kernels = dispatch.backend_for(plain)
    add("torch", lambda weight: lambda x: linear(x, weight), plain)
    if kernels.capabilities.linear:
        add("few", lambda weight: lambda x: kernels.linear(x, weight, None), plain)
    for kind in kinds:
        if inputs % kind.numbers == 0:
            blocks = random_blocks(kind, outputs, inputs)
            add(kind.name, partial(in_blocks, kernels, kind), blocks)
    scale = torch.rand(outputs).bfloat16()
    eight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    add("int8", lambda weight: lambda x: torch._weight_int8pack_mm(x, weight, scale), eight)
    four = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        torch.randint(0, 16, (outputs, inputs), dtype=torch.int32), 1
    )
    scales = torch.rand(inputs // 32, outputs, 2).bfloat16()
    add("int4", lambda weight: lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, 32, scales), four)
    return found


def random_blocks(kind: WeightType, outputs: int, inputs: int) -> torch.Tensor:
    """Returns random codes with scales of the size that weights have, uint8 `[outputs, bytes]`."""
    blocks = torch.randint(0, 256, (outputs, inputs // kind.numbers, kind.nbytes), dtype=torch.uint8)
    for at in SCALES.get(kind.name, (0,)):
        scales = (torch.randn(blocks.shape[:-1]) / 256).half()
        blocks[..., at : at + 2] = scales[..., None].view(torch.uint8)
    return blocks.flatten(-2)


def timed(ways: dict[str, tuple[int, list[Product]]], count: int, inputs: int, turns: int) -> list[dict[str, Any]]:
    """Returns for each way its median time of a product of `count` rows; all take turns."""
    x = torch.randn(count, inputs).bfloat16()
    some = {name: way for name, way in ways.items() if name != "few" or count <= dispatch.few_rows(x)}
    copies = {name: itertools.cycle(products) for name, (_, products) in some.items()}
    runs = [lambda name=name: next(copies[name])(x) for name in some]
    medians = dict(zip(some, medians_ms(runs, turns), strict=True))
    bf16 = min(medians.pop("torch"), medians.pop("few", float("inf")))
    medians = {"bf16": bf16, **medians}
    nbytes = {"bf16": ways["torch"][0], **{name: nbytes for name, (nbytes, _) in ways.items()}}
    return [
        {"way": name, "ms": taken, "gb_s": nbytes[name] / taken / 1e6, "speedup": bf16 / taken}
        for name, taken in medians.items()
    ]


if __name__ == "__main__":
    main()
