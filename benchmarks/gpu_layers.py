"""The parts of `gpu.py` that measure a layer's attention alone: `ceiling`, `decode` and `prefill`."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from gpu_rows import NotHereError, Task  # beside this script
from gpu_runner import Runner
from gpu_sizes import MIN_WINDOW, PAIRS, SHARE
from harness import Row
from torch.nn.attention import SDPBackend, sdpa_kernel

from moacompress.kernels.arguments import Scores, as_tensors
from moacompress.kernels.backend import prefill_alone
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import BLOCK, kept
from moacompress.runtime.cache.layer_cache import PlanCacheLayer
from moacompress.runtime.cache.real_tokens import Chunk

ROOM = 64
"""Tokens that steps may append to a layer's cache."""


class Layer:
    """A layer's cache under equal spans in a pair of formats, with random tokens in it.

    Attributes:
        query: of a step, `[rows, heads, 1, dim]`.
        kept: tokens whose blocks a KV head of a row holds.
        kept_bytes: bytes of those, of all KV heads and rows.
    """

    def __init__(self, runner: Runner, rows: int, tokens: int, pair: tuple[str, str]) -> None:
        sizes, device, dtype = runner.sizes, runner.device, runner.dtype
        rule = replace(Rule(4, 0, SHARE), key_format=pair[0], value_format=pair[1])
        rules = RuleTable.of([rule] * sizes.kv_heads, MIN_WINDOW)
        self._runner, self.scores = runner, Scores(sizes.dim**-0.5)
        self.cache = PlanCacheLayer(rules, tokens + ROOM)
        new = partial(torch.randn, dtype=dtype, device=device)
        self.cache.update(*(new(rows, sizes.kv_heads, tokens, sizes.dim) for _ in "kv"))
        self.cache.commit(Chunk(tokens))
        self.query = new(rows, sizes.heads, 1, sizes.dim)
        self._token = tuple(new(rows, sizes.kv_heads, 1, sizes.dim) for _ in "kv")
        self.kept = int(rules.slots(np.array(tokens, np.int64))[0])
        self.kept_bytes = rows * self.kept * int(rules.token_bytes(sizes.dim, sizes.dim, "bfloat16").sum())

    def step(self) -> torch.Tensor:
        """Appends a token to every row, in rings, and attends: as in a decode step on a GPU."""
        backend = self._runner.backend
        if not backend.capabilities.ring:
            raise NotHereError(f"the kernel {backend.name} has no steps in rings")
        self.cache.update(*self._token)
        found = self.cache.step_in_ring(self.query, self.scores, None, backend)
        assert found is not None
        return found

    def by_tables(self) -> Callable[[], torch.Tensor]:
        """Returns what attends by block tables, and appends nothing."""
        held, backend = self.cache.blocks_held(), self._runner.backend
        cache, rules, lengths = held.view(), as_tensors(held.rules), torch.from_numpy(held.lengths)
        query = self.query[:, :, 0]
        return lambda: backend.decode(query, cache=cache, lengths=lengths, rules=rules, scores=self.scores)[0]


def ceiling(runner: Runner) -> Iterator[Task]:
    """Yields what copying memory and a product of matrices reach."""
    yield Task("copy", lambda: {"GB/s": runner.copied / 1e9})
    yield Task("product", lambda: {"TFLOP/s": runner.multiplied / 1e12})


def decode(runner: Runner) -> Iterator[Task]:
    """Yields a layer's attention of a step: in rings and captured as users have it, by block tables, and by others."""
    cells = runner.sizes.cells
    for (rows, tokens), pair in itertools.product(cells, PAIRS):
        what = f"{rows} x {tokens:,} {'/'.join(pair)}"
        yield Task(f"{what}, a step in rings", partial(_ring_row, runner, rows, tokens, pair))
    for rows, tokens in cells:
        yield Task(f"{rows} x {tokens:,} SDPA, packed", partial(_sdpa_row, runner, rows, tokens))
        for kernel in FLASHINFER:
            what = f"{rows} x {tokens:,} FlashInfer's {kernel}, packed"
            yield Task(what, partial(_flashinfer_row, runner, rows, tokens, kernel))
    for (rows, tokens), pair in itertools.product(cells, PAIRS):
        what = f"{rows} x {tokens:,} {'/'.join(pair)}"
        yield Task(f"{what}, by block tables", partial(_tables_row, runner, rows, tokens, pair))


def _ring_row(runner: Runner, rows: int, tokens: int, pair: tuple[str, str]) -> Row:
    layer = Layer(runner, rows, tokens, pair)
    seconds = runner.seconds(runner.captured(layer.step))
    return _decode_row(runner, layer, seconds) | {"graph": runner.on_gpu}


def _tables_row(runner: Runner, rows: int, tokens: int, pair: tuple[str, str]) -> Row:
    """With the host's lists of work in its time."""
    layer = Layer(runner, rows, tokens, pair)
    return _decode_row(runner, layer, runner.seconds(layer.by_tables()))


def _decode_row(runner: Runner, layer: Layer, seconds: float) -> Row:
    row: Row = {"kernel": runner.backend.name, "kept": layer.kept, "us": seconds * 1e6}
    return row | runner.bytes_row(layer.kept_bytes, seconds)


def _packed(runner: Runner, rows: int, tokens: int) -> tuple[torch.Tensor, ...]:
    """Returns a query, and keys and values of as many tokens as blocks of a plan hold, `[rows, heads, ..., dim]`."""
    sizes = runner.sizes
    rules = RuleTable.of([Rule(4, 0, SHARE)], MIN_WINDOW)
    count = int(rules.slots(np.array(tokens, np.int64))[0])
    query = torch.randn(rows, sizes.heads, 1, sizes.dim, dtype=runner.dtype, device=runner.device)
    key, value = (
        torch.randn(rows, sizes.kv_heads, count, sizes.dim, dtype=runner.dtype, device=runner.device) for _ in "kv"
    )
    return query, key, value


def _packed_row(runner: Runner, key: torch.Tensor, seconds: float) -> Row:
    return {"kept": key.shape[2], "us": seconds * 1e6} | runner.bytes_row(2 * key.nbytes, seconds)


def _sdpa_row(runner: Runner, rows: int, tokens: int) -> Row:
    query, key, value = _packed(runner, rows, tokens)
    attend = partial(F.scaled_dot_product_attention, query, key, value, enable_gqa=True)
    return _packed_row(runner, key, runner.seconds(runner.captured(attend)))


def _flashinfer_row(runner: Runner, rows: int, tokens: int, kernel: str) -> Row:
    """FlashInfer's attention over pages of 16 tokens, which lie in its own layout before it is timed."""
    if importlib.util.find_spec("flashinfer") is None:
        raise NotHereError("flashinfer is not installed")
    query, key, value = _packed(runner, rows, tokens)
    asked, pool = query[:, :, 0].contiguous(), flashinfer_pages(key, value)
    return _packed_row(runner, key, runner.seconds(FLASHINFER[kernel](asked, pool, key.shape)))


def _by_plan(query: torch.Tensor, pool: torch.Tensor, packed: torch.Size) -> Callable[[], torch.Tensor]:
    """Returns a call of the kernel that is planned for on the host, which is done before.

    The query is `[rows, heads, dim]`, the pool that of `flashinfer_pages`, and `packed` the shape of the keys.
    """
    flashinfer = importlib.import_module("flashinfer")
    rows, kv_heads, tokens, dim = packed
    workspace = torch.zeros(1 << 27, dtype=torch.uint8, device=query.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    numbers = partial(torch.arange, dtype=torch.int32, device=query.device)
    last = torch.full((rows,), BLOCK, dtype=torch.int32, device=query.device)
    wrapper.plan(
        numbers(rows + 1) * (tokens // BLOCK),
        numbers(len(pool)),
        last,
        query.shape[1],
        kv_heads,
        dim,
        BLOCK,
        q_data_type=query.dtype,
        kv_data_type=query.dtype,
    )
    return lambda: wrapper.run(query, pool)


def _by_tables(query: torch.Tensor, pool: torch.Tensor, packed: torch.Size) -> Callable[[], torch.Tensor]:
    """Returns a call of the kernel that reads tables and lengths on the device."""
    decode_module = importlib.import_module("flashinfer.decode")
    rows, _, tokens, dim = packed
    workspace = torch.zeros(1 << 27, dtype=torch.uint8, device=query.device)
    tables = torch.arange(len(pool), dtype=torch.int32, device=query.device).view(rows, -1)
    lengths = torch.full((rows,), tokens, dtype=torch.int32, device=query.device).view(torch.uint32)
    attend = partial(decode_module.xqa_batch_decode_with_kv_cache, query, pool, workspace, tables, lengths, tokens)
    return partial(attend, bmm1_scale=dim**-0.5, kv_layout="NHD")


FLASHINFER = {"FA2": _by_plan, "XQA": _by_tables}
"""Kernels of FlashInfer: for both the pool is laid out, and all is planned, before the call that is returned."""


def flashinfer_pages(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Returns keys and values, `[rows, kv_heads, tokens, dim]` of whole pages, in FlashInfer's pages ("NHD").

    They are `[pages, 2, 16, kv_heads, dim]`, contiguous.
    """
    rows, kv_heads, tokens, dim = key.shape
    both = torch.stack((key, value), 1).reshape(rows, 2, kv_heads, tokens // BLOCK, BLOCK, dim)
    return both.permute(0, 3, 1, 4, 2, 5).reshape(-1, 2, BLOCK, kv_heads, dim).contiguous()


def prefill(runner: Runner) -> Iterator[Task]:
    """Yields a layer's attention of a prompt under spans, beside SDPA's causal attention of all."""
    for tokens in runner.sizes.prompts:
        for rule in (Rule(4, 0, SHARE), Rule.FULL):
            what = "full span" if rule.sees_all else "a quarter"
            yield Task(f"{tokens:,} tokens, {what}", partial(_prefill_row, runner, tokens, rule))
        yield Task(f"{tokens:,} tokens, SDPA by cuDNN", partial(_cudnn_row, runner, tokens))


def _prompt(runner: Runner, tokens: int) -> tuple[torch.Tensor, ...]:
    sizes = runner.sizes
    return tuple(
        torch.randn(1, heads, tokens, sizes.dim, dtype=runner.dtype, device=runner.device)
        for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    )


def _prefill_row(runner: Runner, tokens: int, rule: Rule) -> Row:
    query, key, value = _prompt(runner, tokens)
    table = RuleTable.of([rule] * runner.sizes.kv_heads, MIN_WINDOW)
    rules, scores, backend = as_tensors(table), Scores(runner.sizes.dim**-0.5), runner.backend
    counts = np.arange(1, tokens + 1)
    visible = int(kept(counts[:, None], table.span)[:, 0].sum())
    seen = visible / int(counts.sum())
    beside = _causal(runner, SDPBackend.FLASH_ATTENTION, query, key, value)
    seconds = runner.seconds(lambda: prefill_alone(backend, query, key, value, rules=rules, scores=scores))
    operations = 4 * visible * runner.sizes.heads * runner.sizes.dim
    return {
        "kernel": backend.name,
        "ms": seconds * 1e3,
        "SDPA, ms": beside * 1e3,
        "visible share": seen,
        "x SDPA": seconds / beside,
        "x visible share": seconds / beside / seen,
        "share_of_ceiling": operations / seconds / runner.multiplied,
    }


def _cudnn_row(runner: Runner, tokens: int) -> Row:
    if not runner.on_gpu:
        raise NotHereError("there is no cuDNN on this device")
    return {"ms": _causal(runner, SDPBackend.CUDNN_ATTENTION, *_prompt(runner, tokens)) * 1e3}


def _causal(runner: Runner, backend: SDPBackend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> float:
    """Returns the time of SDPA's causal attention, s, on a GPU by one of its backends, with FlashAttention-2 among them."""
    with sdpa_kernel(backend) if runner.on_gpu else contextlib.nullcontext():
        attend = partial(F.scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=True)
        return runner.seconds(attend)
