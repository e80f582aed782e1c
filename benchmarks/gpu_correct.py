"""The part `correct` of `gpu.py`: kernels, logits and replayed steps beside what they must equal, on the same device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from gpu_layers import Layer  # beside this script
from gpu_rows import NotHereError, Task
from gpu_runner import Runner
from gpu_sizes import MIN_WINDOW, PAIRS, SHARE
from harness import Row, random_gates, reference_kernels
from torch.profiler import ProfilerActivity, profile, record_function

from moacompress.bench.sides import random_ids
from moacompress.kernels.arguments import as_tensors
from moacompress.kernels.dispatch import REFERENCE
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.share import Share, with_shared_rules
from moacompress.runtime import PlanCache, attach
from moacompress.runtime.compat.alternates import cache_argument, returned_cache
from moacompress.runtime.hf.device_generation import DeviceSteps, greedy

CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest error beside plain PyTorch, as a share of the largest number."""
FLIPS = 2e-3
"""The same of logits in float32 under formats or gates: what differs in the last bits may be another code or choice."""
TRACED = 4
"""Steps in a trace."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "hipStreamSynchronize")
"""Calls in which the host waits for the device."""
HOST_COPIES = ("Memcpy DtoH", "Memcpy HtoD")
"""Copies between the host and the device, as a trace names them."""


def plans(runner: Runner, model: Any) -> dict[str, Callable[[], Plan]]:
    """Returns what makes plans of every kind, by name: spans, formats, gates, and shared attention."""

    def gated() -> Plan:
        shape = runner.shape(model)
        gates = random_gates(shape, model.config.hidden_size)
        rule = Rule(4, 0, SHARE // 4, select_alpha=16, select_beta_q=SHARE // 2)
        rules = ((rule,) * shape.kv_heads,) * shape.layers
        return Plan(shape, MIN_WINDOW, rules, gates=gates.fingerprint, gate_weights=gates)

    def shared() -> Plan:
        plan = runner.plan(model, *PAIRS[0])
        heads = plan.model.kv_heads
        shares = tuple(
            Share(layer - 1, (*range(1, heads), 0)) if layer % 2 else None for layer in range(plan.model.layers)
        )
        return replace(plan, rules=with_shared_rules(plan.rules, shares), shares=shares)

    coded = {"/".join(pair): partial(runner.plan, model, *pair) for pair in PAIRS}
    return {**coded, "gates": gated, "shared attention": shared}


def correct(runner: Runner) -> Iterator[Task]:
    """Yields how far kernels and logits are from plain PyTorch, whether replayed steps are the steps, and who waits."""
    kinds = [*("/".join(pair) for pair in PAIRS), "gates", "shared attention"]
    for kind in kinds:
        if kind in ("native/native", "int8/int4", "gates", "shared attention"):
            yield Task(f"{runner.sizes.replayed} steps, {kind}", partial(_steps_row, runner, kind))
    for pair in PAIRS:
        yield Task(f"decode {'/'.join(pair)}", partial(_decode_row, runner, pair))
    for dtype in (torch.float32, torch.bfloat16):
        for kind in kinds:
            if kind != "gates" or dtype == torch.float32:  # in bfloat16 other tokens are chosen now and then
                what = f"logits {kind} {str(dtype).removeprefix('torch.')}"
                yield Task(what, partial(_logits_row, runner, kind, dtype))
    for kind in ("int8/int4", "gates", "shared attention"):
        yield Task(f"waits of the host in a step, {kind}", partial(_waits_row, runner, kind))


def _decode_row(runner: Runner, pair: tuple[str, str]) -> Row:
    """Attention by block tables beside plain PyTorch in float32 over the same bytes."""
    layer = Layer(runner, 2, min(runner.sizes.prompts[0], 1000), pair)
    held = layer.cache.blocks_held()
    view = held.view()
    wide = view._replace(keys=[_wide(one) for one in view.keys], values=[_wide(one) for one in view.values])
    wanted, _ = REFERENCE.decode(
        layer.query[:, :, 0].float(),
        cache=wide,
        lengths=torch.from_numpy(held.lengths),
        rules=as_tensors(held.rules),
        scores=layer.scores,
    )
    return _error(runner, layer.by_tables()(), wanted, CLOSE[runner.dtype])


def _logits_row(runner: Runner, kind: str, dtype: torch.dtype) -> Row:
    """A model's logits beside the same model's in plain PyTorch."""
    dense = runner.model(runner.sizes.layers, dtype)
    model = attach(dense, plans(runner, dense)[kind]())
    tokens = min(runner.sizes.prompts[0], 700)
    ids = random_ids((2, tokens), runner.sizes.model["vocab_size"], 1, str(runner.device))
    found = _logits(model, ids)
    with reference_kernels():
        wanted = _logits(model, ids)
    rounds = kind not in ("native/native", "shared attention")
    limit = FLIPS if rounds and dtype == torch.float32 else CLOSE[dtype]
    return _error(runner, found, wanted, limit)


def _wide(memory: torch.Tensor) -> torch.Tensor:
    return memory.float() if memory.is_floating_point() else memory


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Returns logits of a prompt but its last four tokens, and of those one by one."""
    with torch.no_grad():
        done = model(input_ids=ids[:, :-4], use_cache=True)
        found = [done.logits[:, -1:]]
        for one in ids[:, -4:].split(1, 1):
            done = model(input_ids=one, use_cache=True, **cache_argument(returned_cache(done)))
            found.append(done.logits)
    return torch.cat(found, 1)


def _error(runner: Runner, found: torch.Tensor, wanted: torch.Tensor, limit: float) -> Row:
    error = float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())
    return {"kernel": runner.backend.name, "error": error, "limit": limit, "right": error <= limit}


class Decoding:
    """A model under a kind of plan (see `plans`) that has read a prompt, for so many steps that may be compared."""

    def __init__(self, runner: Runner, kind: str, steps: int, dtype: torch.dtype) -> None:
        dense = runner.model(runner.sizes.layers, dtype)
        self.plan, self._steps = plans(runner, dense)[kind](), steps
        self._model = attach(dense, self.plan)
        tokens = min(runner.sizes.prompts[0], 200)
        self._ids = random_ids((2, tokens), runner.sizes.model["vocab_size"], 1, str(runner.device))

    @torch.no_grad()
    def read(self) -> tuple[PlanCache, torch.Tensor]:
        """Returns a cache with the prompt in it, and the next tokens, int64 `[rows]`."""
        cache = PlanCache(self.plan, reserve=self._ids.shape[1] + self._steps + 2)
        logits = self._model(input_ids=self._ids, use_cache=True, logits_to_keep=1, **cache_argument(cache)).logits
        return cache, logits[:, -1].argmax(-1)

    def on_device(self) -> DeviceSteps:
        """Returns steps whose tensors stay where they are."""
        cache, first = self.read()
        positions = torch.full_like(first, self._ids.shape[1])
        return DeviceSteps(self._model, cache, first, positions, self._steps + 1, greedy, first[:0], 0)

    @torch.no_grad()
    def plainly(self) -> torch.Tensor:
        """Returns the new tokens of steps as `generate` makes them, int64 `[rows, steps + 1]`."""
        cache, token = self.read()
        found = [token]
        for _ in range(self._steps):
            logits = self._model(input_ids=token[:, None], use_cache=True, **cache_argument(cache)).logits
            token = logits[:, -1].argmax(-1)
            found.append(token)
        return torch.stack(found, 1)


def _steps_row(runner: Runner, kind: str) -> Row:
    """Steps of a graph beside the same steps without one; where there are no graphs, those beside steps as `generate`'s."""
    steps = runner.sizes.replayed
    decoding = Decoding(runner, kind, steps, runner.dtype if runner.on_gpu else torch.float32)
    replayed = decoding.on_device()
    for _ in range(steps):
        replayed.advance()
    if runner.on_gpu:
        eager = decoding.on_device()
        for _ in range(steps):
            eager.step()
        wanted = eager.tokens
    else:
        wanted = decoding.plainly()
    differ = (replayed.tokens != wanted).any(0).nonzero()
    row: Row = {"kernel": runner.backend.name, "graph": replayed.captured, "right": not len(differ)}
    if runner.on_gpu:
        row["right"] &= replayed.captured
    return row if not len(differ) else row | {"first that differs": int(differ[0])}


def _waits_row(runner: Runner, kind: str) -> Row:
    """What of steps the host waits for, and what is copied between it and the device, captured and not."""
    if not runner.on_gpu:
        raise NotHereError("not measured: only a GPU's trace says who waits")
    row: Row = {"kernel": runner.backend.name}
    decoding = Decoding(runner, kind, 3 * TRACED, runner.dtype)
    for name in ("step", "advance"):
        steps = decoding.on_device()
        run = getattr(steps, name)
        for _ in range(TRACED):
            run()
        torch.cuda.synchronize(runner.device)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as traced, record_function(STEPS):
            for _ in range(TRACED):
                run()
        waits, copies = host_traffic((event.name, event.time_range.start) for event in traced.events())
        row |= {f"waits, {name}": waits, f"copies, {name}": copies}
    counts = [value for name, value in row.items() if name != "kernel"]
    return row | {"right": not any(counts)}


STEPS = "steps"
"""What the traced steps are called in a trace."""


def host_traffic(events: Iterable[tuple[str, float]]) -> tuple[int, int]:
    """Returns how often the host waits in the traced steps, and how often something is copied from it or to it.

    Events have a name, and when they began. What is before the steps is not counted, and of waits nothing after the last call
    that launches something, where the trace itself waits.
    """
    known = sorted(events, key=lambda event: event[1])
    begin = next((time for name, time in known if name == STEPS), 0.0)
    launched = [time for name, time in known if time >= begin and "Launch" in name]
    last = max(launched, default=begin)
    inside = [(name, time) for name, time in known if time >= begin]
    waits = sum(name in WAITS and time <= last for name, time in inside)
    return waits, sum(name.startswith(HOST_COPIES) for name, _ in inside)
