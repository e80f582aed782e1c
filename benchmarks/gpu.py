"""Everything that a GPU is to be asked, in one command under ten minutes; every result is written as soon as it is there.

    python benchmarks/gpu.py -o gpu.json

Parts, each with its share of `--minutes`, and what one does not use goes to the next: `correct` (kernels and a model's logits
against plain PyTorch on the same card, replayed steps against steps, who waits for whom), `ceiling` (what copying memory and
a product of matrices reach), `decode` and `prefill` (kernels alone, as a share of that and beside SDPA and FlashInfer),
`e2e` (a model with random weights under plans, at full span, plain, with a static cache compiled, with transformers' quantized
cache: tokens a second, each side at its own largest batch, and then steps at the same rows and tokens).

Results are lines of JSON; at the end there is one table with the name of the card, and one of the targets. A result that
cannot be had is a line that says why; if the process that has the device ends, another one goes on behind it. `--show` makes
the tables again from the lines. On a CPU, `--small` with `TRITON_INTERPRET=1 MOACOMPRESS_KERNEL=triton` tries all parts at
sizes whose times mean nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from gpu_rows import said_as, table  # beside this script
from gpu_targets import TARGETS, targets
from gpu_worker import WEIGHTS, Asked, run_parts
from harness import Row, listed, markdown, options, read_rows

from moacompress.core.records import end_last_line


def main() -> None:
    """Runs the command line."""
    parser = options(__doc__)
    parser.add_argument(
        "--parts",
        type=partial(listed, known=WEIGHTS),
        default=[*WEIGHTS],
        help=f"some of {', '.join(WEIGHTS)}, with commas",
    )
    parser.add_argument("--device", default="cuda", help="torch device")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU can do, whose times mean nothing")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all parts together")
    parser.add_argument("--show", action="store_true", help="measure nothing, and show the tables of what is in OUT")
    parser.add_argument("-o", "--out", type=Path, required=True, help="lines of JSON")
    given = parser.parse_args()
    if given.show:
        show(read_rows(given.out))
        return
    if given.device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            parser.error("there is no CUDA device; --device cpu --small tries the parts, and measures nothing")
    until = time.monotonic() + given.minutes * 60
    with given.out.open("a+b") as file:
        end_last_line(file)  # of a run that was killed
        begin = file.seek(0, 2)

        def write(row: Row) -> None:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()

        ordered = tuple(part for part in WEIGHTS if part in given.parts)
        run_parts(Asked(given.device, given.small, ordered, until), write)
        rows = read_rows(given.out, begin)
        for row in targets_of(rows):
            write(row)
    show(rows)


def targets_of(rows: Sequence[Row]) -> list[Row]:
    """Returns the targets, of which nothing is measured but on a GPU."""
    return targets([row for row in rows if not row.get("card", "").startswith("a CPU")])


def show(rows: Sequence[Row]) -> None:
    """Prints the results and the targets."""
    rows = [row for row in rows if row["part"] != TARGETS]
    cards = dict.fromkeys(f"{row['card']}, torch {row['torch']}" for row in rows if "card" in row)
    wanted = ([row["what"], row["wanted"], said_as(row["measured"]), row["met"]] for row in targets_of(rows))
    print(f"{'; '.join(cards)}\n\n{table(rows)}\n\n{markdown(['target', 'wanted', 'measured', 'met'], wanted, 4)}")


if __name__ == "__main__":
    main()
