"""What each route of a decode step is worth: the time of a step by the route that it takes, and by every one after it.

    python benchmarks/decode_routes.py --json
    python benchmarks/decode_routes.py --quick
    python benchmarks/decode_routes.py --models smollm2-135m --lengths 4k --situations "batch 1,a hook on one layer"

A situation is a batch, a kind of step, or something that others have put on the model; see `SITUATIONS`. Its first route is
the one that is taken. The ones below it are forced by taking away all before them, down to plain attention with the kernels in
plain PyTorch. Weights and what is in the caches are random, which makes no difference to the time; every KV head keeps a
quarter.

All routes of a situation take turns, some steps each. `ms` is the median of a turn's time of one step and `best_ms` the
least; `over_before` is the median, over turns, of the ratio to the route above, with its quartiles: what that one saves. A
model's head and embedding are part of a step.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from harness import listed, options, random_gates, reference_kernels  # beside this script
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moacompress.bench.bench_request import SPARE_TOKENS, Cell
from moacompress.bench.measure import interleave
from moacompress.bench.sides import random_ids, random_kv, same_weights
from moacompress.models.source import model_shape
from moacompress.rules.budget import parse_lengths
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.runtime import PlanCache, attach
from moacompress.runtime.cache.layer_cache import PlanCacheLayer
from moacompress.runtime.cache.real_tokens import Chunk
from moacompress.runtime.compat.alternates import cache_argument
from moacompress.runtime.decode import all_layers, fused, routes

MODELS: dict[str, dict[str, int | bool]] = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 1024,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}
REFERENCE = "plain, in PyTorch"
"""Beside the routes: plain attention by the reference kernels."""
QUARTER = Rule(16, 0, 256)
GATED = Rule(16, 0, 128, select_beta_q=128)

Change = Callable[[Any], Any]
"""Puts something on a model; returns what is called for a step."""


def nothing(model: Any) -> Any:
    """Leaves a model as it is."""
    return model


def adapters(*targets: str) -> Change:
    """Puts LoRA adapters of rank 8 on linear layers, not merged into them."""

    def put(model: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=8, target_modules=list(targets), init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(model, config).eval().requires_grad_(False)

    return put


def hook_on_a_layer(model: Any) -> Any:
    """Puts a hook on the decoder layer in the middle, as steering does: it adds to the hidden states."""
    middle = model.model.layers[len(model.model.layers) // 2]
    middle.register_forward_hook(lambda module, args, out: out + 1e-3)
    return model


def hooks_on_attention(model: Any) -> Any:
    """Puts a hook on the attention of every layer, as probing does: it looks at what comes out."""
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, out: None)
    return model


def compiled(model: Any) -> Any:
    """Compiles a model's step into one graph for all lengths."""
    return torch.compile(model, fullgraph=True, dynamic=True)


@dataclass(frozen=True)
class Situation:
    """Where steps are made.

    Attributes:
        rows: of the batch.
        tokens: fed to every row in a step; more than one are drafts to be checked.
        left_padded: whether rows are of unequal lengths, padded on the left.
        ended: whether every other row has ended and is fed padding.
        gated: whether every KV head has a gate.
        family: of the model.
        change: what is put on it.
    """

    rows: int = 1
    tokens: int = 1
    left_padded: bool = False
    ended: bool = False
    gated: bool = False
    family: str = "llama"
    change: Change = nothing


SITUATIONS = {
    "batch 1": Situation(),
    "batch 8": Situation(rows=8),
    "batch 16": Situation(rows=16),
    "left-padded batch 8": Situation(rows=8, left_padded=True),
    "batch 8 with ended rows": Situation(rows=8, ended=True),
    "five drafts": Situation(tokens=5),
    "LoRA on queries and values": Situation(change=adapters("q_proj", "v_proj")),
    "LoRA on the feed-forward": Situation(change=adapters("gate_proj", "up_proj", "down_proj")),
    "a hook on one layer": Situation(change=hook_on_a_layer),
    "batch 8 with a hook on one layer": Situation(rows=8, change=hook_on_a_layer),
    "hooks on all attention": Situation(change=hooks_on_attention),
    "gates": Situation(gated=True),
    "gates in batch 8 with ended rows": Situation(rows=8, ended=True, gated=True),
    "gates and a hook on one layer": Situation(gated=True, change=hook_on_a_layer),
    "Qwen3": Situation(family="qwen3"),
    "compiled": Situation(change=compiled),
    "batch 8 compiled": Situation(rows=8, change=compiled),
}


TAKEN_AWAY: dict[str, Callable[[], Any]] = {
    "all layers": lambda: patch.object(all_layers.Stack, "begin", lambda *given: None),
    "one layer": lambda: patch.object(fused, "_layer", lambda *given: None),
    "cache step": lambda: patch.object(routes.CacheStep, "can", lambda *given: False),
    "plain": reference_kernels,
}
"""How each route is taken away, in the order of the routes; after plain attention come the kernels in PyTorch."""


def taken_away(count: int) -> ExitStack:
    """Returns a context in which the first `count` routes are not there."""
    stack = ExitStack()
    for away in [*TAKEN_AWAY.values()][:count]:
        stack.enter_context(away())
    return stack


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts the layers that go by each route meanwhile."""
    found: Counter[str] = Counter()

    def counting(route: Any) -> Callable[[Any], Any]:
        run = route.run

        def call(request: Any) -> Any:
            out = run(request)
            if out is not None:
                found[route.name] += request.layers
            return out

        return call

    with ExitStack() as stack:
        for route in routes.ROUTES:
            stack.enter_context(patch.object(route, "run", counting(route)))
        yield found


def dense_model(family: str, size: dict[str, int | bool], dtype: str) -> PreTrainedModel:
    """Returns a model with random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, max_position_embeddings=1 << 16, **size)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    made.requires_grad_(False)
    return made


def plan_for(shape: ModelShape, inputs: int, gated: bool) -> Plan:
    """Returns the plan: the same rule for every KV head, with random gates where there are some."""
    plan = Plan(shape, 16, ((GATED if gated else QUARTER,) * shape.kv_heads,) * shape.layers)
    return plan.with_gates(random_gates(shape, inputs)) if gated else plan


class Steps:
    """Steps in a situation of a dense model, which is left as it is, from a cache with random content on.

    A row of the cache has `length` tokens. A turn has `steps`, after one that is not timed.
    """

    def __init__(self, situation: Situation, model: PreTrainedModel, length: int, steps: int) -> None:
        shape, rows = model_shape(model), situation.rows
        plan = plan_for(shape, model.config.hidden_size, situation.gated)
        under_plan = attach(same_weights(model), plan)
        self.situation, self.steps, self.length = situation, steps, length
        self.forward = situation.change(under_plan)
        end = length + (steps + 1) * situation.tokens
        self.ids = random_ids((rows, end), model.config.vocab_size, 1, "cpu")
        real = np.ones((rows, end), np.bool_)
        if situation.left_padded:
            real[:, :length] = np.arange(length) >= np.arange(rows)[:, None] * length // (2 * rows)
        if situation.ended:
            real[1::2, length:] = False
        self.real = None if real.all() else real
        cell = Cell(model.config.dtype.__str__().removeprefix("torch."), length, rows)
        self.filled = PlanCache(plan, reserve=end + SPARE_TOKENS)
        self.fill(shape, cell)

    def fill(self, shape: ModelShape, cell: Cell) -> None:
        """Puts random keys and values into the cache."""
        real = None if self.real is None else self.real[:, : self.length]
        chunk = Chunk(self.length, None if real is None or real.all() else real)
        for layer in self.filled.layers:
            layer.record_past = self.situation.tokens > 1
        self.filled.expect(chunk.real, None, self.length)
        for layer, (key, value) in zip(self.filled.layers, random_kv(shape, cell, 2, "cpu"), strict=True):
            assert isinstance(layer, PlanCacheLayer)
            layer.update(key, value)
            scores = torch.randint(-(1 << 15), 1 << 15, key.shape[:3], dtype=torch.int16)
            layer.commit(chunk, scores if layer.rules.selects else None)

    def prepare(self) -> None:
        """Takes a fork of the filled cache, and the first step on it."""
        self.cache: Any = None  # its blocks are free again before they are needed
        self.cache = self.filled.fork()
        self.step(0)

    def run(self) -> None:
        """Takes the steps that are timed."""
        for number in range(1, self.steps + 1):
            self.step(number)

    def step(self, number: int) -> None:
        """Takes one step."""
        first = self.length + number * self.situation.tokens
        fed, more = slice(first, first + self.situation.tokens), {}
        if self.real is not None:
            more["attention_mask"] = torch.from_numpy(self.real[:, : fed.stop])
        with torch.no_grad():
            self.forward(input_ids=self.ids[:, fed], use_cache=True, **cache_argument(self.cache), **more)

    def routes(self, first: int | None = None) -> dict[str, int]:
        """Returns the first routes that steps can go by, the one that is taken first, and how many others are taken away."""
        found: dict[str, int] = {}
        seen: list[Counter[str]] = []
        for count in range(len(TAKEN_AWAY) + 1):
            if len(found) == first:
                break
            with taken_away(count), counted() as layers:
                self.prepare()
            name = REFERENCE if count == len(TAKEN_AWAY) else " + ".join(name for name, _ in layers.most_common())
            if layers not in seen or name == REFERENCE:
                found[name] = count
            seen.append(layers)
        return found


class Turn:
    """Steps by one route; the `count` routes before it are away from its `prepare` until another turn's."""

    away = ExitStack()

    def __init__(self, steps: Steps, count: int) -> None:
        self.steps, self.count = steps, count

    def prepare(self) -> None:
        """Takes the routes away, and the first step."""
        Turn.away.close()
        Turn.away = taken_away(self.count)
        self.steps.prepare()

    def run(self) -> None:
        """Takes the steps that are timed."""
        self.steps.run()


def measured(
    steps: Steps, turns: int, clock: Callable[[], float] = time.perf_counter, below: int | None = None
) -> list[dict[str, Any]]:
    """Returns the times of the routes of a situation: the one that is taken, and all or so many `below` it."""
    first = None if below is None else below + 1
    found = {name: Turn(steps, count) for name, count in steps.routes(first).items()}
    try:
        seconds = interleave(found, turns + 1, clock)
    finally:
        Turn.away.close()
    times = {name: [1e3 * second / steps.steps for second in taken[1:]] for name, taken in seconds.items()}
    rows: list[dict[str, Any]] = []
    for name, taken in times.items():
        row = {"route": name, "ms": round(statistics.median(taken), 3), "best_ms": round(min(taken), 3)}
        if rows:
            ratios = [one / before for one, before in zip(taken, times[rows[-1]["route"]], strict=True)]
            row["over_before"] = [round(float(part), 3) for part in np.quantile(ratios, (0.5, 0.25, 0.75))]
        rows.append(row)
    return rows


def main() -> None:
    """Reads the command line and measures."""
    parser = options(__doc__)
    parser.add_argument(
        "--models", type=partial(listed, known=MODELS), default=[*MODELS], help=f"with commas; {', '.join(MODELS)}"
    )
    parser.add_argument("--lengths", default="1k,4k", help="tokens in the cache, with commas")
    parser.add_argument(
        "--situations", type=partial(listed, known=SITUATIONS), help=f"with commas; {', '.join(SITUATIONS)}"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--layers", type=int, help="decoder layers of the models, instead of their own")
    parser.add_argument(
        "--below", type=int, help="routes that are forced below the one that is taken; all, if not given"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the thread's time on its core, on a busy machine"
    )
    parser.add_argument("--quick", action="store_true", help="the tiny model at 1k, not compiled, 4 steps, 5 turns")
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    args = parser.parse_args()
    if args.quick:
        args.models, args.lengths, args.steps, args.turns = ["tiny"], "1k", 4, 5
        args.situations = args.situations or [name for name in SITUATIONS if "compiled" not in name]
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time counts one thread: leave --threads out")
    torch.set_num_threads(args.threads)
    clock = time.thread_time if args.cpu_time else time.perf_counter
    rows = []
    for name, length in itertools.product(args.models, parse_lengths(args.lengths)):
        dense: dict[str, PreTrainedModel] = {}
        for said in args.situations or SITUATIONS:
            situation = SITUATIONS[said]
            if situation.family not in dense:
                size = MODELS[name] | ({"num_hidden_layers": args.layers} if args.layers else {})
                dense[situation.family] = dense_model(situation.family, size, args.dtype)
            steps = Steps(situation, dense[situation.family], length, args.steps)
            row: dict[str, Any] = {"model": name, "length": length, "situation": said}
            rows.append({**row, "routes": measured(steps, args.turns, clock, args.below)})
            if not args.json:
                print(f"{name}, {length} tokens, {said}", *map(shown, rows[-1]["routes"]), sep="\n  ", flush=True)
    if args.json:
        settings = {"dtype": args.dtype, "threads": args.threads}
        print(json.dumps({**settings, "steps": args.steps, "turns": args.turns, "runs": rows}))


def shown(row: dict[str, Any]) -> str:
    """Returns a route's times as a line."""
    over = row.get("over_before")
    ratio = "" if over is None else f"  x {over[0]:.3f} ({over[1]:.3f} to {over[2]:.3f})"
    return f"{row['route']:44} {row['ms']:9.3f} ms, best {row['best_ms']:9.3f}{ratio}"


if __name__ == "__main__":
    main()
