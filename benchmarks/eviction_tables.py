"""Markdown tables of evaluations: each side at the plan's bytes, and what each task keeps at every length.

    python benchmarks/eviction_tables.py eighth.1k.json eighth.2k.json --sides kvzip:unseen,kvzip:seen,quantized:hqq-4
    python benchmarks/eviction_tables.py eighth.1k.json --keep docs/data/

A file is what `moacompress eval plan/ --against dense,... -o` wrote of more tasks than one. Retention is of the prompts of all
tasks and lengths in it that dense answers right, by both attentions where it was measured by both; NLL is in nats per
token. Brackets are 95% intervals; p is that of an exact test (retention) or of a permutation test (NLL) of the paired
difference. All of it is computed from the scores of single prompts in the file. `--keep` writes these alone, so that they can
lie beside the tables that are made of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness import markdown, options  # beside this script

from moacompress.core.files import write_text
from moacompress.core.tables import estimate_text, p_text
from moacompress.evaluation.baselines.compared_models import DENSE, DENSE_SIDES, PLAN
from moacompress.evaluation.scoring.result_rows import POOLED, pooled_rows, result_rows
from moacompress.evaluation.scoring.stored_scores import measured_again
from moacompress.rules.budget import format_length

METRICS = ("retention", "nll")
Row = dict[str, Any]


def read_scores(path: Path) -> dict[str, Any]:
    """Returns the scores of single prompts in a file, with what they are of.

    Raises:
        SystemExit: it has none.
    """
    found = json.loads(path.read_text("utf-8"))
    if not found.get("scores"):
        raise SystemExit(f"{path} has no scores of single prompts; evaluate again with this version")
    return {name: found[name] for name in ("checkpoint", "wording", "scores") if name in found}


class Evaluation:
    """What was measured, as the file at `path` has it.

    Attributes:
        lengths: nominal, tokens, ascending.
        tasks: in the order of the file.
        sides: in the order of the file; the plan and dense first.

    Raises:
        SystemExit: the file has no rows of dense, or of several tasks.
    """

    def __init__(self, path: Path) -> None:
        rows = read_scores(path)["scores"]
        cells = measured_again(rows)
        fields = [comparison for _, comparison in cells]
        self.lengths = sorted({cell.length for cell, _ in cells})
        self.tasks = [*dict.fromkeys(cell.task for cell, _ in cells)]
        self.sides = [*dict.fromkeys(row["model"] for row in rows)]
        if len(self.tasks) < 2 or DENSE not in self.sides:
            raise SystemExit(f"{path}: an evaluation of two tasks or more with dense among its sides is wanted")
        pooled, differences = pooled_rows(fields)
        self._differences = {(row["model"], row["task"], row["metric"]): row for row in differences}
        self._results: dict[tuple[str, str, int | None, str], Row] = {
            (row["model"], row["task"], None, row["metric"]): row for row in pooled
        }
        for cell in cells:
            self._results |= {
                (row["model"], row["task"], cell[0].length, row["metric"]): row for row in result_rows(*cell)
            }

    def row(self, side: str, task: str, metric: str, length: int | None = None) -> Row | None:
        """Returns a row of results; None where dense answers none of a task, so that nothing can be retained."""
        return self._results.get((side, task, length, metric))

    def less(self, side: str, metric: str) -> Row | None:
        """Returns the row of the plan less another side, of all tasks together; None for the plan."""
        return self._differences.get((side, POOLED, metric))

    def share(self, side: str) -> float:
        """Returns the bytes of a side as a share of dense's."""
        ours, theirs = (self._results[name, POOLED, None, "nll"]["kv_bytes"] for name in (side, DENSE))
        return float(ours / theirs)

    def right(self, task: str, length: int | None = None) -> tuple[int, int]:
        """Returns how many prompts of a task dense answers right, and how many there are."""
        row, kept = self._results[DENSE, task, length, "exact_match"], self.row(DENSE, task, "retention", length)
        return (0 if kept is None else kept["prompts"]), row["prompts"]


def side_table(found: Evaluation) -> str:
    """Returns all sides, a line each."""
    count, _ = found.right(POOLED)
    rest = ("plan less this, retention", "plan less this, NLL")
    lines = []
    for side in found.sides:
        kept, nll = (found.row(side, POOLED, metric) for metric in METRICS)
        assert nll is not None
        said = "" if kept is None else estimate_text(kept["value"], kept["ci95"])
        less = (found.less(side, metric) for metric in METRICS)
        apart = (
            "" if row is None else f"{estimate_text(row['value'], row['ci95'], '+.2f')}, {p_text(row['p'])}"
            for row in less
        )
        lines.append([f"`{side}`", f"{found.share(side):.1%}", said, f"{nll['value']:.3f}", *apart])
    return markdown(["", "KV bytes, of dense", f"retention, of {count}", "NLL", *rest], lines)


def task_table(all_found: list[Evaluation], sides: list[str]) -> str:
    """Returns what is retained of each task at every length, by the plan, by `sides`, and by the best of the others."""
    at = [(found, length) for found in all_found for length in found.lengths]
    lengths = ", ".join(format_length(length) for _, length in at)
    heads = ("task", f"dense is right at {lengths}", PLAN, *(f"`{side}`" for side in sides), "best of the others")
    lines = []
    for task in dict.fromkeys(task for found in all_found for task in found.tasks):
        here = [(found, length) for found, length in at if found.row(DENSE, task, "nll", length) is not None]
        right = ", ".join("{} of {}".format(*found.right(task, length)) for found, length in here)
        cells = [", ".join(_kept(found, [side], task, length) for found, length in here) for side in (PLAN, *sides)]
        others = ", ".join(
            _kept(found, [side for side in found.sides if side not in (PLAN, *DENSE_SIDES, *sides)], task, length)
            for found, length in here
        )
        lines.append([f"`{task}`", right, *cells, others])
    return markdown(heads, lines)


def _kept(found: Evaluation, sides: list[str], task: str, length: int) -> str:
    rows = [row for side in sides if (row := found.row(side, task, "retention", length)) is not None]
    return f"{max(row['value'] for row in rows):.2f}" if rows else "-"


def main() -> None:
    """Prints the tables."""
    parser = options(__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="of `moacompress eval -o`")
    parser.add_argument("--sides", default="", help="comma-separated: columns of their own in the table of tasks")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="write the scores there, under the names of the files"
    )
    given = parser.parse_args()
    for path in given.files if given.keep else ():
        write_text(given.keep / path.name, json.dumps(read_scores(path)) + "\n")
    all_found = [Evaluation(path) for path in given.files]
    for found in all_found:
        print(f"At {' and '.join(f'{length:,}' for length in found.lengths)} tokens:\n\n{side_table(found)}\n")
    print(f"Retention by task:\n\n{task_table(all_found, [side for side in given.sides.split(',') if side])}")


if __name__ == "__main__":
    main()
