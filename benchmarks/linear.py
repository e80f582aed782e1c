"""Products of many rows in float32: torch's own, oneDNN's on the weight as it lies, and on one that is packed before.

    python benchmarks/linear.py
    python benchmarks/linear.py --shapes 1536x576 --rows 512 --turns 50

The three take turns; milliseconds are medians. On AMD's processors the runtime has oneDNN multiply the weight as it lies.
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
from moacompress.runtime.linear import onednn_product


def medians_ms(ways: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Returns milliseconds of each way, after one turn that is not timed."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns + 1):
        for name, way in ways.items():
            begun = perf_counter()
            way()
            taken[name].append(1e3 * (perf_counter() - begun))
    return {name: median(times[1:]) for name, times in taken.items()}


def main() -> None:
    """Prints a row for each shape and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1536x576,4096x4096", help="outputs x inputs of weights")
    parser.add_argument("--rows", default="16,128,512,1024", help="of the input")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"{processor_name()}, {given.threads} threads")
    for shape in given.shapes.split(","):
        outputs, inputs = map(int, shape.split("x"))
        weight = torch.randn(outputs, inputs)
        for rows in map(int, given.rows.split(",")):
            x = torch.randn(rows, inputs)
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            with torch.inference_mode():
                found = medians_ms(
                    {
                        "torch": partial(linear, x, weight),
                        "oneDNN": partial(onednn_product, x, weight, None),
                        "packed": partial(onednn_product, x, packed, None),
                    },
                    given.turns,
                )
            print(
                f"{shape}, {rows} rows: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in found.items()), flush=True
            )


if __name__ == "__main__":
    main()
