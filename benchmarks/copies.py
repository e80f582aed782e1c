"""What a layer loses that copies the attention of the one before it, repaired or not.

    python benchmarks/copies.py path/to/model --text prose/ --layers 5,8,10,15,18,22,25,28,29

Windows of prose; KL to the dense model in nats over their later halves, mean and standard error over windows that nothing was
fitted to. Of a copy every KV head takes the anchor's head whose attention moves its output least, and the layer's output
projection is refitted (`calibration.copy_repair`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile.passes import all_attended
from moacompress.calibration.profile.sharing import Attended
from moacompress.core.statistics import error_text, standard_error
from moacompress.models.source import SourceModel, load_source
from moacompress.prompts.pools import Prose, Split
from moacompress.repair.copies import copied, repaired_copies
from moacompress.repair.projections import Weights
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.share import Share
from moacompress.search.measure.objective import Objective


def windows(source: SourceModel, prose: Prose, split: Split, tokens: int, count: int) -> list[Sample]:
    """Returns samples of a pool of prose whose later halves count."""
    words = [word for document in prose.pools[split] for word in document]
    mask, found = np.arange(tokens) >= tokens // 2, []
    for first in np.linspace(0, len(words) - tokens, count).astype(int).tolist():
        ids = source.tokenizer(" ".join(words[first : first + tokens])).input_ids[:tokens]
        found.append(Sample(np.array(ids, np.int64), mask, "prose", tokens, "text"))
    return found


def copy_map(source: SourceModel, seen: list[dict[int, Attended]], layer: int) -> tuple[int, ...]:
    """Returns of every KV head the anchor's head that moves its attention output least."""
    heads = source.shape.kv_heads
    moved = torch.zeros(heads, heads)
    for one in seen:
        own = copied(one[layer], one[layer], Share(layer, tuple(range(heads)))).unflatten(1, (heads, -1))
        for anchor in range(heads):
            other = copied(one[layer], one[layer - 1], Share(layer - 1, (anchor,) * heads)).unflatten(1, (heads, -1))
            moved[:, anchor] += (other - own).square().sum((0, 2))
    return tuple(moved.argmin(1).tolist())


def main() -> None:
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--layers", default="")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--fitted", type=int, default=18, help="windows that are fitted to")
    parser.add_argument("--windows", type=int, default=8, help="windows that are measured on")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    source = load_source(args.model, dtype="float32")
    shape = source.shape
    layers = [int(layer) for layer in args.layers.split(",") if layer] or list(range(1, shape.layers))
    prose = Prose.load(args.text)
    fitted = windows(source, prose, "calibration", args.tokens, args.fitted)
    held = windows(source, prose, "evaluation", args.tokens, args.windows)
    seen = [all_attended(source.model, shape, sample.input_ids) for sample in fitted[:4]]
    rules = ((Rule.FULL,) * shape.kv_heads,) * shape.layers

    def measured(layer: int, share: Share, weights: Weights) -> list[float | None]:
        plan = Plan(shape, 32, rules, shares=tuple(share if at == layer else None for at in range(shape.layers)))
        kls = Objective(source.model, held, lambda plan: weights).kls(plan)
        return [float(kls.mean()), standard_error(kls.tolist())]

    rows: list[dict[str, Any]] = []
    ways = ("same_heads", "copy", "repaired")
    for layer in layers:
        same = tuple(range(shape.kv_heads))
        copy = Share(layer - 1, copy_map(source, seen, layer))
        repair = repaired_copies(source.model, shape, [(layer, copy)], fitted, torch.bfloat16)[0]
        row: dict[str, Any] = {
            "layer": layer,
            "head_map": list(copy.head_map),
            "same_heads": measured(layer, Share(layer - 1, same), {}),
            "copy": measured(layer, copy, {}),
            "left": repair.left,
            "repaired": measured(layer, copy, repair.weights),
        }
        rows.append(row)
        if not args.json:
            texts = [f"{name} {error_text(*row[name])}" for name in ways]
            print(f"{layer}  {list(copy.head_map)}  left {repair.left:.2f}", *texts, sep="  ", flush=True)
    if args.json:
        print(json.dumps({"runs": rows}))


if __name__ == "__main__":
    main()
