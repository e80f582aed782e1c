"""How many of the answers that a dense model gets right in one dtype it gets right in another.

    python benchmarks/dtypes.py path/to/model@float32 path/to/model@bfloat16 --tasks needle-noise,key-value --prompts 30

Every side is a dense MODEL and the dtype that it computes in, as transformers runs it; the first one is what the others are
compared with. Where an answer hangs by a hair, rounding decides: what the dense model itself keeps in bfloat16 is the most that
a plan in bfloat16 can be asked to keep of what dense gets right in float32.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moacompress.core.statistics import estimate_row, estimate_text, mean, rate
from moacompress.evaluation.scoring.prompts import Score, batches, score_batch
from moacompress.evaluation.scoring.result_rows import POOLED
from moacompress.evaluation.scoring.retention import retention
from moacompress.evaluation.tasks.cases import Case
from moacompress.evaluation.tasks.registry import Resources, make_cases
from moacompress.models.source import load_source
from moacompress.prompts.pools import Prose
from moacompress.rules.budget import parse_lengths
from moacompress.runtime.linear import use_kernels


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", nargs="+", metavar="MODEL@DTYPE", help="dense models, the reference first")
    parser.add_argument("--tasks", default="needle-noise", help="with commas")
    parser.add_argument("--lengths", default="1k", help="tokens, with commas")
    parser.add_argument("--prompts", type=int, default=20, help="of each task and length")
    parser.add_argument("--text", type=Path, help="long prose, for the tasks that need it")
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    given = parser.parse_args()
    resources = Resources(prose=Prose.load(given.text) if given.text is not None else None)
    asked = [(task, length) for task in given.tasks.split(",") for length in parse_lengths(given.lengths)]
    scores: dict[str, dict[str, list[Score]]] = {}
    rows = []
    for side in given.sides:
        model, _, dtype = side.rpartition("@")
        scores[side] = side_scores(model, dtype, asked, given.prompts, resources)
        found = side_rows(side, scores[side], scores[given.sides[0]])
        rows += found
        for row in [] if given.json else found:
            said = {
                name: estimate_text(row[name]["value"], row[name]["ci95"], ".3f")
                for name in ("retention", "exact_match", "nll")
                if row[name]
            }
            kept = f"keeps {said['retention']} of {row['right']}, " if row["right"] else ""
            print(f"{row['task']:24} {side}: {kept}exact {said['exact_match']}, NLL {said['nll']}", flush=True)
    if given.json:
        print(json.dumps({"rows": rows}))


def side_scores(
    model: str, dtype: str, asked: Sequence[tuple[str, int]], prompts: int, resources: Resources
) -> dict[str, list[Score]]:
    """Returns the scores of a dense model in a dtype, by task and length."""
    source = load_source(model, dtype=dtype)
    use_kernels(source.model)
    found = {}
    for task, length in asked:
        cases: list[Case] = make_cases(task, length, prompts, 0, source.tokenizer, resources)
        scores: dict[int, Score] = {}
        for members in batches(cases, len(source.tokenizer)):
            batch = score_batch(source.model, source.tokenizer, [cases[index] for index in members])
            scores |= zip(members, batch, strict=True)
        found[f"{task} {length:,}"] = [scores[index] for index in range(len(cases))]
    return found


def side_rows(side: str, scores: dict[str, list[Score]], reference: dict[str, list[Score]]) -> list[dict[str, Any]]:
    """Returns a row for each task and length, and one of all prompts.

    Args:
        side: its name.
        scores: its scores, by task and length.
        reference: the same of the first side.
    """
    tasks = {name: [name] for name in scores} | {POOLED: list(scores)}
    rows = []
    for task, names in tasks.items():
        ours, theirs = ([score for name in names for score in held[name]] for held in (scores, reference))
        exact = [score.exact_match for score in ours]
        kept = retention([score.exact_match for score in theirs], exact)
        rows.append(
            {
                "task": task,
                "side": side,
                "retention": estimate_row(*kept[:2]) if kept else None,
                "right": kept[2] if kept else 0,
                "exact_match": estimate_row(*rate(exact)),
                "nll": estimate_row(*mean([score.nll for score in ours])),
            }
        )
    return rows


if __name__ == "__main__":
    main()
