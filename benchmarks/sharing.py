"""How much of a decode step goes when layers share attention, beside what reading the dropped bytes takes.

    python benchmarks/sharing.py path/to/model --layers 9 --batch 8 --length 4k --json

Full span throughout: the model as it is and with layers that copy the attention of the one before them, in turns. The caches
hold random keys and values, as much to read as those of a prompt. `dropped_ms` is what the bytes of the dropped keys and
weights take to read once, as measured on a buffer that no cache holds.
"""

from __future__ import annotations

import json
import statistics
from functools import partial
from typing import Any

import harness  # beside this script
import torch

from moacompress.models.source import load_source
from moacompress.rules.budget import parse_lengths
from moacompress.rules.plan import Plan
from moacompress.rules.share import Share
from moacompress.runtime import attach, detach
from moacompress.runtime.cache.plan_cache import PlanCache
from moacompress.runtime.cache.real_tokens import Chunk
from moacompress.runtime.compat.alternates import cache_argument

BUFFER = 1 << 28
"""Numbers of the buffer that bandwidth is measured on, half a gigabyte of bfloat16."""


def shared(plan: Plan, layers: int) -> Plan:
    """Returns a plan whose every third layer from the end on shares the attention of the one before it, so many of them."""
    last = plan.model.layers - 1
    reuse_layers = {last - 3 * i for i in range(layers)}
    heads = tuple(range(plan.model.kv_heads))
    shares = tuple(Share(layer - 1, heads) if layer in reuse_layers else None for layer in range(last + 1))
    return Plan(plan.model, plan.min_window, plan.rules, shares=shares)


def filled(plan: Plan, batch: int, length: int) -> PlanCache:
    """Returns a cache of so many random tokens a row; rows differ, so they share no blocks."""
    shape, cache = plan.model, PlanCache(plan)
    for layer in cache.layers:
        key, value = torch.randn(2, batch, shape.kv_heads, length, shape.head_dim, dtype=torch.bfloat16)
        layer.update(key, value)
        layer.commit(Chunk.of(None, length))
    return cache


def measure(source: str, layers: int, batch: int, length: int, repeats: int, turns: int) -> dict[str, Any]:
    """Times steps of the plans in turns.

    Returns:
        `step_ms` and `kv_bytes` of each plan, `dropped_bytes` and `dropped_ms` of those that share, and `gone`, the share of
        that time by which their steps are shorter.
    """
    model = load_source(source, dtype="bfloat16")
    full = Plan.full(model.shape)
    plans = {"full span": full, "copy": shared(full, layers)}
    caches, weights = {}, {}
    token = torch.randint(3, model.model.config.vocab_size, (batch, 1))
    with torch.inference_mode():
        for name, plan in plans.items():
            attach(model.model, plan)
            caches[name] = filled(plan, batch, length)
            weights[name] = sum(weight.numel() * weight.element_size() for weight in model.model.parameters())
            detach(model.model)
        buffer = torch.ones(BUFFER, dtype=torch.bfloat16).view(torch.int32)
        bandwidth = buffer.numel() * 4 / harness.medians_ms([buffer.max], 5)[0] * 1e3
        times: dict[str, list[float]] = {name: [] for name in plans}
        for _ in range(turns):
            for name, plan in plans.items():
                attach(model.model, plan)
                step = partial(model.model, token, **cache_argument(caches[name]))
                step()
                times[name] += harness.medians_ms([step], repeats)
                detach(model.model)
    rows: dict[str, Any] = {}
    for name, cache in caches.items():
        rows[name] = {"step_ms": statistics.median(times[name]), "kv_bytes": cache.used_bytes()}
        if name != "full span":
            one = rows["full span"]
            dropped = one["kv_bytes"] - cache.used_bytes() + weights["full span"] - weights[name]
            rows[name] |= {"dropped_bytes": dropped, "dropped_ms": 1e3 * dropped / bandwidth}
            rows[name]["gone"] = (one["step_ms"] - rows[name]["step_ms"]) / rows[name]["dropped_ms"]
        rows[name]["routes"] = dict(cache.step_routes)
    return {"layers": layers, "batch": batch, "length": length, "bytes_per_second": bandwidth, "plans": rows}


def main() -> None:
    """Prints what was measured."""
    parser = harness.options(__doc__)
    parser.add_argument("model")
    parser.add_argument("--layers", type=int, default=9, help="layers that share")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=parse_lengths, default=[4096])
    parser.add_argument("--repeats", type=int, default=15, help="steps of a turn")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.model, options.layers, options.batch, options.length[0], options.repeats, options.turns)
    if options.json:
        print(json.dumps(found))
        return
    for name, row in found["plans"].items():
        gone = (
            f", {row['gone']:.0%} of the {row['dropped_ms']:.1f} ms of its dropped bytes gone" if "gone" in row else ""
        )
        print(f"{name:10} {row['step_ms']:7.1f} ms a step{gone}")


if __name__ == "__main__":
    main()
