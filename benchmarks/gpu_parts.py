"""The parts of `gpu.py`: what is measured on a card, each a generator of results."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from moacompress.bench.bench_request import Cell
from moacompress.bench.graphs import CompiledForward
from moacompress.bench.sides import STATIC, DecodeTurn, FilledPlanCache, filled_cache, random_ids, same_weights
from moacompress.kernels import dispatch
from moacompress.kernels.arguments import CacheView, Scores, as_tensors
from moacompress.kernels.backend import Backend, prefill_alone
from moacompress.kernels.dispatch import REFERENCE
from moacompress.kernels.kv_parts import KVPart
from moacompress.models.source import model_shape
from moacompress.rules.formats import FORMATS
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import BLOCK
from moacompress.runtime import attach
from moacompress.runtime.compat.alternates import cache_argument, returned_cache
from moacompress.runtime.hf.device_generation import DeviceSteps, greedy

PAIRS = (("native", "native"), ("int8", "int8"), ("int8", "int4"), ("int4", "int4"))
SHARE = 256
"""Of 1,024 tokens, how many a plan's windows grow by: a quarter."""
MIN_WINDOW = 64
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest error beside plain PyTorch in float32, as a share of the largest number."""
Row = dict[str, Any]


class Sizes(NamedTuple):
    """What is measured, by its size.

    Attributes:
        model: of the configuration.
        cells: rows and tokens of decode steps.
        prompts: tokens of prompts.
        sample: tokens of a profiled sample.
        copy: bytes that are copied.
        repeats: of every measurement.
        layers: of the model whose logits are compared.
    """

    model: dict[str, int]
    cells: tuple[tuple[int, int], ...]
    prompts: tuple[int, ...]
    sample: int
    copy: int
    repeats: int
    layers: int

    @property
    def heads(self) -> int:
        """Query heads of a layer."""
        return self.model["num_attention_heads"]

    @property
    def kv_heads(self) -> int:
        """KV heads of a layer."""
        return self.model["num_key_value_heads"]

    @property
    def dim(self) -> int:
        """Numbers of a key, and of a value."""
        return self.model["hidden_size"] // self.heads


LARGE = Sizes(
    {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    ((1, 32768), (8, 8192), (8, 32768), (56, 8192)),
    (4096, 16384),
    4096,
    1 << 30,
    20,
    4,
)
SMALL = Sizes(
    {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 160,
        "max_position_embeddings": 512,
    },
    ((2, 96),),
    (80,),
    96,
    1 << 16,
    1,
    2,
)


class Runner:
    """What all parts share: the device, sizes, and clocks.

    Args:
        device: torch device.
        sizes: of what is measured.
    """

    def __init__(self, device: str, sizes: Sizes) -> None:
        self.device, self.sizes = torch.device(device), sizes
        self.dtype = torch.bfloat16
        self._cold = torch.empty(min(sizes.copy, 1 << 28), dtype=torch.uint8, device=device)

    @property
    def backend(self) -> Backend:
        """What runs attention there."""
        return dispatch.backend_for(torch.empty(0, dtype=self.dtype, device=self.device))

    def seconds(self, run: Callable[[], Any], repeats: int | None = None) -> float:
        """Returns the median time of a call, s, each after what caches of the card hold was written over."""
        run()
        found = []
        for _ in range(repeats or self.sizes.repeats):
            self._cold.zero_()
            found.append(self._once(run))
        return statistics.median(found)

    def _once(self, run: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin_event.record()
        run()
        end_event.record()
        torch.cuda.synchronize(self.device)
        return float(begin_event.elapsed_time(end_event)) / 1e3

    def config(self, layers: int | None = None) -> LlamaConfig:
        """Returns the configuration of a model, whose layers may be fewer."""
        sizes: dict[str, Any] = self.sizes.model | ({} if layers is None else {"num_hidden_layers": layers})
        return LlamaConfig(**sizes, dtype="bfloat16", bos_token_id=None, eos_token_id=None)

    def model(self, layers: int | None = None, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
        """Returns a model with random weights."""
        torch.manual_seed(0)
        with torch.device(self.device):
            made: Any = LlamaForCausalLM(self.config(layers))
        found: LlamaForCausalLM = made.to(dtype).eval().requires_grad_(False)
        return found

    def plan(self, model: LlamaForCausalLM, key: str = "native", value: str = "native") -> Plan:
        """Returns a plan of equal spans, a quarter of the tokens, in a pair of formats."""
        shape = model_shape(model)
        rule = Rule(4, 0, SHARE, key, value)
        return Plan(shape, MIN_WINDOW, ((rule,) * shape.kv_heads,) * shape.layers)


class Layer(NamedTuple):
    """A layer's cache with random tokens in it.

    Attributes:
        cache: pool and table.
        lengths: int64 `[rows]`.
        rules: of its KV heads.
        query: `[rows, heads, head_dim]`.
        kept_bytes: that a step reads.
        kept: tokens of the blocks that a KV head sees.
    """

    cache: CacheView
    lengths: torch.Tensor
    rules: RuleTable
    query: torch.Tensor
    kept_bytes: int
    kept: int


def layer_of(runner: Runner, rows: int, tokens: int, pair: tuple[str, str], *, full: bool = False) -> Layer:
    """Returns a layer's cache under equal spans; blocks that no query sees are not there."""
    sizes, device, dtype = runner.sizes, runner.device, runner.dtype
    heads, kv_heads, dim = sizes.heads, sizes.kv_heads, sizes.dim
    rule = replace(Rule.FULL if full else Rule(4, 0, SHARE), key_format=pair[0], value_format=pair[1])
    rules = RuleTable.of([rule] * kv_heads, MIN_WINDOW)
    lengths = torch.full((rows,), tokens, dtype=torch.int64, device="cpu")
    table = torch.full((rows, kv_heads, -(-tokens // BLOCK)), -1, dtype=torch.int32, device="cpu")
    for begin, end in rules.block_runs(lengths.numpy())[:, :, 0, 0].tolist():
        table[:, :, begin:end] = 0
    there = table >= 0
    blocks = int(there.sum())
    table[there] = torch.randperm(blocks, dtype=torch.int32, device="cpu")
    parts = [
        KVPart(FORMATS[name].code, dim, dtype, values=values) for name, values in zip(pair, (False, True), strict=True)
    ]
    pools: list[tuple[torch.Tensor]] = []
    for part in parts:
        memory = part.new(blocks, device)
        slots = torch.arange(blocks * BLOCK, device=device)
        for some in slots.split(1 << 20):
            part.write(memory, some, torch.randn(len(some), dim, dtype=dtype, device=device))
        pools.append((memory,))
    query = torch.randn(rows, heads, dim, dtype=dtype, device=device)
    kept = int(there[0, 0].sum()) * BLOCK
    token_bytes = int(rules.token_bytes(dim, dim, "bfloat16")[0])
    return Layer(
        CacheView(pools[0], pools[1], table, dim), lengths, rules, query, rows * kv_heads * kept * token_bytes, kept
    )


def correct(runner: Runner) -> Iterator[Row]:
    """Yields how far kernels and logits are from plain PyTorch in float32 on the same device."""
    backend = runner.backend
    scores = Scores(runner.sizes.dim**-0.5)
    for pair in PAIRS:
        layer = layer_of(runner, 2, min(runner.sizes.prompts[0], 1000), pair)
        rules = as_tensors(layer.rules)
        found, _ = backend.decode(layer.query, cache=layer.cache, lengths=layer.lengths, rules=rules, scores=scores)
        wide = layer.cache._replace(
            keys=[_wide(one) for one in layer.cache.keys], values=[_wide(one) for one in layer.cache.values]
        )
        asked = layer.query.float()
        wanted, _ = REFERENCE.decode(asked, cache=wide, lengths=layer.lengths, rules=rules, scores=scores)
        yield _error(f"decode {'/'.join(pair)}", backend.name, found, wanted, runner.dtype)
    for dtype in (torch.float32, torch.bfloat16):
        dense = runner.model(runner.sizes.layers, dtype)
        for pair in PAIRS:
            compressed = attach(same_weights(dense), runner.plan(dense, *pair))
            ids = random_ids(
                (2, min(runner.sizes.prompts[0], 700)), runner.sizes.model["vocab_size"], 1, str(runner.device)
            )
            found = _logits(compressed, ids)
            with plain_kernels():
                wanted = _logits(compressed, ids)
            yield _error(f"logits {'/'.join(pair)} {dtype}".replace("torch.", ""), backend.name, found, wanted, dtype)


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Has all attention run in plain PyTorch."""
    before = os.environ.get(dispatch.VARIABLE)
    os.environ[dispatch.VARIABLE] = REFERENCE.name
    dispatch.forget()
    try:
        yield
    finally:
        os.environ.pop(dispatch.VARIABLE)
        if before is not None:
            os.environ[dispatch.VARIABLE] = before
        dispatch.forget()


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


def _error(what: str, kernel: str, found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> Row:
    error = float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())
    return {"what": what, "kernel": kernel, "error": error, "limit": CLOSE[dtype], "right": error <= CLOSE[dtype]}


def ceiling(runner: Runner) -> Iterator[Row]:
    """Yields what copying memory and a product of matrices reach."""
    source = torch.empty(runner.sizes.copy, dtype=torch.uint8, device=runner.device)
    target = torch.empty_like(source)
    yield {"what": "copy", "GB/s": 2 * len(source) / runner.seconds(lambda: target.copy_(source)) / 1e9}
    size = min(8192, int(runner.sizes.copy**0.5) // 4)
    a, b = (torch.randn(size, size, dtype=runner.dtype, device=runner.device) for _ in range(2))
    yield {"what": f"product of {size}", "TFLOP/s": 2 * size**3 / runner.seconds(lambda: a @ b) / 1e12}


def decode(runner: Runner) -> Iterator[Row]:
    """Yields a layer's attention of a step: as bytes/s, and beside SDPA over as many tokens, packed."""
    scores = Scores(runner.sizes.dim**-0.5)
    backend = runner.backend
    for (rows, tokens), pair in itertools.product(runner.sizes.cells, PAIRS):
        layer = layer_of(runner, rows, tokens, pair)
        rules = as_tensors(layer.rules)

        def step(layer: Layer = layer, rules: RuleTable = rules) -> Any:
            return backend.decode(layer.query, cache=layer.cache, lengths=layer.lengths, rules=rules, scores=scores)

        seconds = runner.seconds(step)
        row = {"what": f"{rows} x {tokens:,} {'/'.join(pair)}", "kernel": backend.name, "kept": layer.kept}
        row |= {"us": seconds * 1e6, "GB/s": layer.kept_bytes / seconds / 1e9}
        if pair == PAIRS[0]:
            query, key, value = _packed(runner, rows, layer.kept)
            row["SDPA, us"] = (
                runner.seconds(partial(F.scaled_dot_product_attention, query, key, value, enable_gqa=True)) * 1e6
            )
        yield row


def _packed(runner: Runner, rows: int, tokens: int) -> tuple[torch.Tensor, ...]:
    heads, kv_heads, dim = runner.sizes.heads, runner.sizes.kv_heads, runner.sizes.dim
    query = torch.randn(rows, heads, 1, dim, dtype=runner.dtype, device=runner.device)
    key, value = (torch.randn(rows, kv_heads, tokens, dim, dtype=runner.dtype, device=runner.device) for _ in "kv")
    return query, key, value


def prefill(runner: Runner) -> Iterator[Row]:
    """Yields a layer's attention of a prompt under spans, beside SDPA's causal attention of all."""
    sizes = runner.sizes
    heads, kv_heads, dim = sizes.heads, sizes.kv_heads, sizes.dim
    backend = runner.backend
    for tokens in runner.sizes.prompts:
        query = torch.randn(1, heads, tokens, dim, dtype=runner.dtype, device=runner.device)
        key, value = (torch.randn(1, kv_heads, tokens, dim, dtype=runner.dtype, device=runner.device) for _ in "kv")
        full = runner.seconds(
            partial(F.scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=True)
        )
        for rule in (Rule.FULL, Rule(4, 0, SHARE)):
            rules = as_tensors(RuleTable.of([rule] * kv_heads, MIN_WINDOW))

            def run(q: Any = query, k: Any = key, v: Any = value, rules: RuleTable = rules) -> Any:
                return prefill_alone(backend, q, k, v, rules=rules, scores=Scores(dim**-0.5))

            seconds = runner.seconds(run)
            row = {
                "what": f"{tokens:,} tokens, {'full span' if rule.sees_all else 'a quarter'}",
                "kernel": backend.name,
            }
            yield row | {"ms": seconds * 1e3, "SDPA, ms": full * 1e3, "x SDPA": seconds / full}


def profile(runner: Runner) -> Iterator[Row]:
    """Yields the time of a profiled sample beside a forward and a backward pass of SDPA, of a model of a few layers."""
    import numpy as np

    from moacompress.calibration.data.samples import Sample
    from moacompress.calibration.profile.passes import frozen
    from moacompress.calibration.profile.sample_statistics import sample_statistics
    from moacompress.recipe_sections import ProfileRecipe
    from moacompress.rules.candidates import candidate_rules

    model, length = runner.model(runner.sizes.layers), runner.sizes.sample
    chosen = ProfileRecipe(draws=1)
    ids = np.random.default_rng(0).integers(0, runner.sizes.model["vocab_size"], length)
    targets = min(32, length // 4)
    sample = Sample(ids, np.arange(length) >= length - targets, "random", length)
    table = RuleTable.of(candidate_rules(length, chosen.sinks, chosen.min_window), chosen.min_window)
    shape, tokens = model_shape(model), torch.from_numpy(ids).to(runner.device)
    rows = torch.arange(length - targets - 1, length - 1, device=runner.device)

    def plain() -> None:
        with frozen(model), torch.enable_grad():
            embeddings = model.get_input_embeddings()(tokens[None]).detach().requires_grad_()
            logits = model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=rows).logits[0]
            torch.autograd.grad(F.cross_entropy(logits.float(), tokens[rows + 1]), embeddings)

    few = min(3, runner.sizes.repeats)
    seconds = runner.seconds(lambda: sample_statistics(model, shape, table, sample, chosen, None, 0, 0, None), few)
    beside = runner.seconds(plain, few)
    what = f"{length:,} tokens, {runner.sizes.layers} layers, {len(table)} rules"
    yield {"what": what, "ms": seconds * 1e3, "SDPA, ms": beside * 1e3, "x SDPA": seconds / beside}


def e2e(runner: Runner) -> Iterator[Row]:
    """Yields steps of a model by every side, and tokens a second of each at its own largest batch."""
    dense = runner.model()
    sides: dict[str, tuple[str, Any, Plan]] = {"plain": ("dense", dense, Plan.full(model_shape(dense)))}
    sides["full span"] = (
        "full_span",
        attach(same_weights(dense), Plan.full(model_shape(dense))),
        Plan.full(model_shape(dense)),
    )
    for pair in (PAIRS[0], PAIRS[2]):
        plan = runner.plan(dense, *pair)
        sides[f"a quarter, {'/'.join(pair)}"] = ("plan", attach(same_weights(dense), plan), plan)
    for rows, tokens in runner.sizes.cells:
        cell = Cell("bfloat16", tokens, rows)
        for name, (side, model, plan) in sides.items():
            yield _attempt(f"{rows} x {tokens:,} {name}", partial(_step_ms, runner, model, side, plan, cell))
        for name, (side, model, plan) in sides.items():
            if side == "plan":
                what = f"{rows} x {tokens:,} {name}, steps on the device"
                yield _attempt(what, partial(_device_step_ms, runner, model, plan, cell))
        compiled = CompiledForward(copy.copy(dense)) if runner.device.type == "cuda" else None
        if compiled is not None:
            plan = sides["plain"][2]
            yield _attempt(
                f"{rows} x {tokens:,} static cache, compiled",
                partial(_step_ms, runner, dense, STATIC, plan, cell, compiled),
            )
        yield _attempt(f"{rows} x {tokens:,} transformers' quantized cache", partial(_quantized, runner, dense, cell))
        yield _attempt(f"{rows} x {tokens:,} FlashInfer's decode, a layer", partial(_flashinfer, runner, rows, tokens))
    tokens = runner.sizes.cells[-1][1]
    for name, (side, model, plan) in sides.items():
        rows, best = 1, {}
        while rows <= (4096 if runner.device.type == "cuda" else 2):
            found = _attempt(
                f"{tokens:,} {name}",
                partial(_step_ms, runner, model, side, plan, Cell("bfloat16", tokens, rows)),
            )
            if "failed" in found:
                break
            best = {"largest batch": rows, "tokens/s": rows / found["ms"] * 1e3}
            rows *= 2
        yield {"what": f"{tokens:,} {name}, its largest batch", **best}


def _attempt(what: str, run: Callable[[], Row]) -> Row:
    """Returns a row, or its error; memory that it took is free again."""
    try:
        return {"what": what, **run()}
    except (RuntimeError, ImportError, ValueError, NotImplementedError) as error:
        return {"what": what, "failed": str(error).splitlines()[0][:200]}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _step_ms(runner: Runner, model: Any, side: str, plan: Plan, cell: Cell, forward: Any = None) -> Row:
    steps, device = (16 if runner.device.type == "cuda" else 2), str(runner.device)
    filled = filled_cache(side, model, plan, cell, steps, 0, device)
    ids = random_ids((steps + 1, cell.batch, 1), runner.sizes.model["vocab_size"], 1, device)
    turn = DecodeTurn(forward or model, filled, ids, cell.length, device)
    found = []
    for _ in range(min(3, runner.sizes.repeats)):
        turn.prepare()
        begin = time.perf_counter()
        turn.run()
        found.append((time.perf_counter() - begin) / steps)
    return {"ms": statistics.median(found) * 1e3, "KV GiB": filled.kv_bytes() / 2**30, "routes": turn.routes}


def _device_step_ms(runner: Runner, model: Any, plan: Plan, cell: Cell) -> Row:
    """A step whose tensors stay where they are; on a GPU one that is captured as a graph."""
    warm, steps = 2, 16 if runner.device.type == "cuda" else 1
    made, device = warm + 1 + steps, str(runner.device)
    filled = FilledPlanCache(plan, plan.model, cell, cell.length + made + 1, 0, device)
    first = random_ids((cell.batch,), runner.sizes.model["vocab_size"], 1, device)
    turn = DeviceSteps(model, filled.cache, first, torch.full_like(first, cell.length), made + 1, greedy, first[:0], 0)
    for _ in range(warm):
        turn.advance()
    seconds = runner.seconds(turn.advance, steps)
    return {"ms": seconds * 1e3, "graph": turn.captured}


def _quantized(runner: Runner, dense: Any, cell: Cell) -> Row:
    """A step with transformers' own quantized cache of four bits."""
    from transformers import QuantizedCache

    cache = QuantizedCache("hqq", dense.config, nbits=4)
    ids = random_ids((cell.batch, cell.length), runner.sizes.model["vocab_size"], 1, str(runner.device))
    with torch.no_grad():
        for some in ids.split(2048, 1):
            dense(input_ids=some, use_cache=True, logits_to_keep=1, **cache_argument(cache))
        seconds = runner.seconds(lambda: dense(input_ids=ids[:, :1], use_cache=True, **cache_argument(cache)), 3)
    return {"ms": seconds * 1e3}


def _flashinfer(runner: Runner, rows: int, tokens: int) -> Row:
    """FlashInfer's attention of a step over all tokens of a quarter, packed in pages."""
    if importlib.util.find_spec("flashinfer") is None:
        raise ImportError("flashinfer is not installed")
    flashinfer = importlib.import_module("flashinfer")

    query, key, value = _packed(runner, rows, tokens * SHARE // 1024)
    rows, kv_heads, kept, dim = key.shape
    pages = kept // BLOCK
    pool = torch.stack((key, value), 2).transpose(1, 3).reshape(rows * pages, BLOCK, 2, kv_heads, dim).transpose(1, 2)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(1 << 27, dtype=torch.uint8, device=runner.device), "NHD"
    )
    at = torch.arange(rows + 1, dtype=torch.int32, device=runner.device) * pages
    ids = torch.arange(rows * pages, dtype=torch.int32, device=runner.device)
    last = torch.full((rows,), BLOCK, dtype=torch.int32, device=runner.device)
    wrapper.plan(at, ids, last, query.shape[1], kv_heads, dim, BLOCK, data_type=runner.dtype, q_data_type=runner.dtype)
    return {"ms": runner.seconds(lambda: wrapper.run(query[:, :, 0], pool.contiguous())) * 1e3}


PARTS: dict[str, Callable[[Runner], Iterator[Row]]] = {
    "correct": correct,
    "ceiling": ceiling,
    "decode": decode,
    "prefill": prefill,
    "profile": profile,
    "e2e": e2e,
}
