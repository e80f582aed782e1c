"""Products of many rows: torch's own, and others that the runtime has in their place.

    python benchmarks/linear.py
    python benchmarks/linear.py --shapes 1536x576 --rows 512 --turns 50
    python benchmarks/linear.py --dtype bfloat16

In float32 these are oneDNN's on the weight as it lies, which the runtime takes on AMD's processors with AVX-512, and on one
that is packed before. 16-bit numbers are made float32, a part of the weight at a time, which the runtime does where torch does
not have oneDNN multiply them. All take turns; milliseconds are medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter

import torch
from torch.nn.functional import linear

from moacompress.core.machine import processor_name
from moacompress.runtime.linear import float32_product, onednn_product


def medians_ms(ways: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Returns milliseconds of each way, after one turn that is not timed."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns + 1):
        for name, way in ways.items():
            begun = perf_counter()
            way()
            taken[name].append(1e3 * (perf_counter() - begun))
    return {name: median(times[1:]) for name, times in taken.items()}


def products(x: torch.Tensor, weight: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Returns the products of a dtype by name."""
    found: dict[str, Callable[[], object]] = {"torch": partial(linear, x, weight)}
    if x.dtype != torch.float32:
        return {**found, "float32": partial(float32_product, x, weight, None)}
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
    return {
        **found,
        "oneDNN": partial(onednn_product, x, weight, None),
        "packed": partial(onednn_product, x, packed, None),
    }


def main() -> None:
    """Prints a row for each shape and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1536x576,4096x4096", help="outputs x inputs of weights")
    parser.add_argument("--rows", default="16,128,512,1024", help="of the input")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    dtype = getattr(torch, given.dtype)
    print(f"{processor_name()}, {given.threads} threads, {given.dtype}")
    for shape in given.shapes.split(","):
        outputs, inputs = map(int, shape.split("x"))
        weight = torch.randn(outputs, inputs).to(dtype)
        for rows in map(int, given.rows.split(",")):
            with torch.inference_mode():
                found = medians_ms(products(torch.randn(rows, inputs).to(dtype), weight), given.turns)
            print(
                f"{shape}, {rows} rows: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in found.items()), flush=True
            )


if __name__ == "__main__":
    main()
