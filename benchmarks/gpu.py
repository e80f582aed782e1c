"""Everything that a GPU is to be asked, in one command under ten minutes; every result is written as soon as it is there.

    python benchmarks/gpu.py -o gpu.json

Parts, each with its share of `--minutes`: `correct` (kernels and a model's logits against plain PyTorch on the same card),
`ceiling` (what copying memory and a product of matrices reach), `decode` and `prefill` (kernels alone, as a share of that and
beside SDPA), `profile` (a profiled sample beside a forward and backward pass of SDPA), `e2e` (steps of a model with random
weights: under a plan, at full span, plain, with a static cache compiled, with transformers' quantized cache, FlashInfer's
decode where it is installed; and tokens a second, each side at its own largest batch). `ruler` is asked for alone, with
`--parts ruler --model DIR`: RULER at 4k on a compressed checkpoint and the dense model through `moacompress eval`, which goes
on where it stopped; how long it will take and what memory it needs is said first.

Results are lines of JSON; at the end there is one table with the name of the card. A result that cannot be had is a line with
what failed, and the next one is tried. On a CPU, `--small` with `TRITON_INTERPRET=1 MOACOMPRESS_KERNEL=triton` tries all
parts at sizes whose times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu_parts import LARGE, PARTS, SMALL, Row, Runner  # beside this script

from moacompress.bench.sides import synchronize


def ruler(folder: Path, minutes: float, out: Path) -> None:
    """Runs RULER at 4k on a compressed checkpoint and on the dense model, and says before what that takes."""
    prompts = 100
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(
        f"RULER at 4k, {prompts} prompts a task, of {folder} and the dense model: about twice {size / 2**30:.1f} GiB of memory "
        f"and, for each task, the time of {2 * prompts} prompts of 4,096 tokens; stopped, it goes on where it was",
        flush=True,
    )
    command = [sys.executable, "-m", "moacompress", "eval", str(folder), "--against", "dense", "--tasks", "ruler"]
    command += [
        "--lengths",
        "4k",
        "--prompts",
        str(prompts),
        "--device",
        "cuda",
        "-o",
        str(out.with_suffix(".ruler.json")),
    ]
    subprocess.run(command, check=True, timeout=minutes * 60 if minutes else None)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join((*PARTS, 'ruler'))}, with commas")
    parser.add_argument("--device", default="cuda", help="torch device")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU can do, whose times mean nothing")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all parts together")
    parser.add_argument("--model", type=Path, help="a compressed checkpoint, for ruler")
    parser.add_argument("-o", "--out", type=Path, required=True, help="lines of JSON")
    given = parser.parse_args()
    parts = given.parts.split(",")
    unknown = [part for part in parts if part not in (*PARTS, "ruler")]
    if unknown:
        parser.error(f"{unknown[0]!r} is no part; there are {', '.join((*PARTS, 'ruler'))}")
    if "ruler" in parts:
        if given.model is None or len(parts) > 1:
            parser.error("ruler goes alone, with --model DIR")
        ruler(given.model, 0, given.out)
        return
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --small tries the parts, and measures nothing")
    card = torch.cuda.get_device_name() if given.device.startswith("cuda") else "a CPU, not a measurement"
    runner = Runner(given.device, SMALL if given.small else LARGE)
    rows, share = [], given.minutes * 60 / len(parts)
    with given.out.open("a") as file:
        for part in parts:
            until = time.monotonic() + share
            for row in _safely(part, PARTS[part](runner)):
                rows.append({"part": part, "card": card, "torch": torch.__version__, **row})
                file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
                if time.monotonic() > until:
                    rows.append({"part": part, "card": card, "what": "its time is over"})
                    file.write(json.dumps(rows[-1]) + "\n")
                    break
            synchronize(given.device)
    print(f"{card}, torch {torch.__version__}\n\n| part | what | result |\n| --- | --- | --- |")
    for row in rows:
        found = {name: value for name, value in row.items() if name not in ("part", "card", "torch", "what")}
        said = ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()
        )
        print(f"| {row['part']} | {row.get('what', '')} | {said} |")


def _safely(part: str, rows: Iterator[Row]) -> Iterator[Row]:
    """Yields rows; an error is a row, and the end of the part."""
    try:
        yield from rows
    except Exception as error:
        yield {"what": part, "failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


if __name__ == "__main__":
    main()
