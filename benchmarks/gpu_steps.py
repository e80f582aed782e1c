"""The part `e2e` of `gpu.py`: tokens a second and steps of a whole model, under plans and without, each side as it is best."""

from __future__ import annotations

import copy
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
from gpu_rows import NotHereError, Task  # beside this script
from gpu_runner import Runner
from gpu_sizes import CODED, FULL, PAIRS, PLAIN, QUANTIZED, QUARTER, STATIC, UNDER_PLANS
from harness import Row
from transformers import DynamicCache, LlamaForCausalLM, QuantizedCache, StaticCache

from moacompress.bench.bench_request import Cell
from moacompress.bench.graphs import CompiledForward
from moacompress.bench.sides import FilledPlanCache, overlapping_kv, random_ids, same_weights
from moacompress.models.weight_bytes import weight_bytes
from moacompress.rules.plan import Plan
from moacompress.runtime import attach
from moacompress.runtime.compat.alternates import cache_argument
from moacompress.runtime.hf.device_generation import DeviceSteps, greedy

WARM = 3
"""Steps before those that are timed: one goes into rings, one is captured, one is the first of the graph."""
FILL = 0.92
"""Share of the memory beside the weights that caches are tried with first."""
SPARE = 3 << 29
"""Bytes that are left for what a step makes."""
SMALLER = 0.85
"""What rows are tried next, where there was not enough memory, as a share of those that were tried."""
TRIES = 4


class Sides:
    """The sides of the comparison, all of one set of random weights; each is made when it is first asked for."""

    def __init__(self, runner: Runner) -> None:
        self._runner, self._models = runner, dict[str, Any]()

    @cached_property
    def dense(self) -> LlamaForCausalLM:
        """The model without a plan."""
        return self._runner.model()

    @cached_property
    def read_bytes(self) -> int:
        """Bytes of the weights that a step reads: all but the table of embeddings."""
        table: Any = self.dense.get_input_embeddings()
        return sum(weight_bytes(self.dense).values()) - int(table.weight.nbytes)

    def plan(self, side: str) -> Plan:
        """Returns the plan of a side; of one that has none, that of full span."""
        if side in (QUARTER, CODED):
            return self._runner.plan(self.dense, *(PAIRS[0] if side == QUARTER else PAIRS[2]))
        return Plan.full(self._runner.shape(self.dense))

    def model(self, side: str) -> Any:
        """Returns the model of a side."""
        if side not in UNDER_PLANS:
            return self.dense
        if side not in self._models:
            self._models[side] = attach(same_weights(self.dense), self.plan(side))
        return self._models[side]


def e2e(runner: Runner) -> Iterator[Task]:
    """Yields tokens a second of each side at its own largest batch, and then steps of all sides at the same rows and tokens."""
    sides, tokens = Sides(runner), runner.sizes.batch
    for side in (PLAIN, CODED, QUARTER, FULL):
        yield Task(f"{tokens:,} tokens, {side}, its largest batch", partial(_largest_row, runner, sides, side, tokens))
    for rows, length in runner.sizes.cells:
        for side in (PLAIN, *UNDER_PLANS):
            yield Task(f"{rows} x {length:,} {side}", partial(_step_row, runner, sides, side, rows, length))
    for side in (STATIC, QUANTIZED):
        for rows, length in runner.sizes.cells:
            yield Task(f"{rows} x {length:,} {side}", partial(_step_row, runner, sides, side, rows, length))
        yield Task(f"{tokens:,} tokens, {side}, its largest batch", partial(_largest_row, runner, sides, side, tokens))
    for rows, length in runner.sizes.cells:
        what = f"{rows} x {length:,} {CODED}, steps of generate"
        yield Task(what, partial(_step_row, runner, sides, CODED, rows, length, captured=False))


def _step_row(runner: Runner, sides: Sides, side: str, rows: int, tokens: int, captured: bool = True) -> Row:
    free(runner)
    ms, more = step_ms(runner, sides, side, rows, tokens, captured)
    return {"ms": ms, **more, **_read_row(runner, sides, side, rows, tokens, ms)}


def _read_row(runner: Runner, sides: Sides, side: str, rows: int, tokens: int, ms: float) -> Row:
    """Returns the bytes that a step must read, weights and the cache of its plan, and what they are in its time."""
    if side == QUANTIZED:
        return {}
    size = sides.read_bytes + sides.plan(side).kv_bytes(tokens, rows)
    return {"bytes": size, **runner.bytes_row(size, ms / 1e3)}


def _largest_row(runner: Runner, sides: Sides, side: str, tokens: int) -> Row:
    """Tokens a second with as many rows as memory holds, found from the bytes of a row and then by trying."""
    each = sides.plan(side).kv_bytes(tokens + WARM + 1)
    rows = tried = 2
    if runner.on_gpu:
        free(runner)
        _ = sides.model(side)
        room = torch.cuda.mem_get_info(runner.device)[0] - SPARE
        if side == QUANTIZED:
            each //= 2
        rows = max(1, int(FILL * room / each))
    for _ in range(TRIES):
        free(runner)
        tried = rows
        try:
            ms, more = step_ms(runner, sides, side, rows, tokens)
            row = {"rows": rows, "tokens/s": rows / ms * 1e3, "ms": ms, **more}
            return row | _read_row(runner, sides, side, rows, tokens, ms)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "captur" not in str(error):
                raise
        rows = max(1, int(rows * SMALLER))
    raise MemoryError(f"not even {tried} rows of {tokens:,} tokens go into memory")


def free(runner: Runner) -> None:
    """Gives back the memory of what was measured last."""
    gc.collect()
    if runner.on_gpu:
        torch.cuda.empty_cache()


def step_ms(
    runner: Runner, sides: Sides, side: str, rows: int, tokens: int, captured: bool = True
) -> tuple[float, Row]:
    """Returns the time of a step, ms, with so many tokens of every row in the cache, and what else there is to say of it.

    Under a plan steps are those of `generate_on_device`, on a GPU a graph's, or, not `captured`, those of `generate`.
    """
    cell, device = Cell("bfloat16", tokens, rows), str(runner.device)
    timed = 16 if runner.on_gpu else 1
    model, plan = sides.model(side), sides.plan(side)
    kv = overlapping_kv(plan.model, cell, 0, device)
    if side in UNDER_PLANS:
        filled = FilledPlanCache(plan, cell, tokens + WARM + timed + 1, 0, device, kv)
        size = filled.kv_bytes() / 2**30
        del kv
        if not captured:
            run = _plain_steps(runner, model, filled.cache, rows, tokens)
            return _timed(runner, run, timed), {"KV GiB": size, "graph": False}
        first = random_ids((rows,), runner.sizes.model["vocab_size"], 1, device)
        positions = torch.full_like(first, tokens)
        steps = DeviceSteps(model, filled.cache, first, positions, WARM + timed + 1, greedy, first[:0], 0)
        return _timed(runner, steps.advance, timed), {"KV GiB": size, "graph": steps.captured}
    more: Row = {}
    forward: Callable[..., Any] = model
    cache: Any
    if side == QUANTIZED:
        backend = "hqq" if importlib.util.find_spec("hqq") is not None else "fp8"
        cache = QuantizedCache(backend, model.config, **({"nbits": 4} if backend == "hqq" else {}))
        more["backend"] = backend
    elif side == STATIC:
        if not runner.on_gpu:
            raise NotHereError("compiling takes minutes, and says nothing of a GPU")
        cache = StaticCache(config=model.config, max_cache_len=tokens + WARM + timed + 1)
        forward = CompiledForward(copy.copy(model))
    else:
        cache = DynamicCache(config=model.config)
    for layer, (key, value) in enumerate(kv):
        cache.update(key.contiguous(), value.contiguous(), layer)
    del kv, key, value
    run = _plain_steps(runner, forward, cache, rows, tokens)
    if not isinstance(forward, CompiledForward):
        return _timed(runner, run, timed), more
    for _ in range(WARM):
        run()
    forward.begin()
    ms = _timed(runner, run, timed - WARM)
    return ms, more | {"one graph": forward.proof().problem or True}


def _plain_steps(runner: Runner, forward: Callable[..., Any], cache: Any, rows: int, tokens: int) -> Callable[[], None]:
    """Returns a step that feeds each row a token, at the next position every time."""
    ids = random_ids((rows, 1), runner.sizes.model["vocab_size"], 1, str(runner.device))
    positions = torch.full_like(ids, tokens)

    def step() -> None:
        with torch.no_grad():
            forward(input_ids=ids, position_ids=positions, use_cache=True, **cache_argument(cache))
            positions.add_(1)

    return step


def _timed(runner: Runner, run: Callable[[], None], steps: int) -> float:
    """Returns the median time of a step, ms, from its first launch until its results are there; some steps go before."""
    for _ in range(WARM):
        run()
    found = []
    for _ in range(steps):
        synchronized(runner)
        begin = time.perf_counter()
        run()
        synchronized(runner)
        found.append(time.perf_counter() - begin)
    return statistics.median(found) * 1e3


def synchronized(runner: Runner) -> None:
    """Waits until the device has done what it was given."""
    if runner.on_gpu:
        torch.cuda.synchronize(runner.device)
