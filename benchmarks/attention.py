"""Decode and prefill of one layer: under a plan, at full span, torch's own attention, and what the machine could do at best.

    python benchmarks/attention.py --json

Tensors rotate over half a gigabyte, so that the last cache does not decide. `limit_ms` is the larger of two times measured
here: reading as many bytes as the kept keys and values have, and the multiplications of their attention at the measured peak.
`sdpa_best_ms` is the faster of torch's two forms of grouped attention. All are medians, in milliseconds, for one layer; plan,
full span and reading take turns. Decode has a row for each pair of formats of keys and values (`bits`), of the same spans; all
pairs take turns with each other, and `native_ms` is the time of the native one.
On a busy machine `--cpu-time` counts the time of one thread on its core instead of wall time.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import medians_ms, options  # beside this script

from moacompress.kernels import dispatch
from moacompress.kernels.arguments import CacheView, Scores, as_tensors
from moacompress.kernels.backend import prefill_alone
from moacompress.kernels.kv_parts import KVPart
from moacompress.rules.formats import FORMATS, NATIVE
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import BLOCK
from moacompress.runtime.linear import onednn_product

MIN_WINDOW = 16
ROTATE_BYTES = 512 << 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Heads:
    """Heads of a layer."""

    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads}x{self.head_dim}"


SHAPES = (Heads(9, 3, 64), Heads(32, 8, 128))
timed = medians_ms
"""By the clock that is asked for."""
scattered = False
FORMATS_TIMED = ((NATIVE, NATIVE), ("int8", "int8"), ("int6", "int6"), ("int8", "int4"), ("int4", "int4"))
"""Formats of keys and of values."""


def arguments(shape: Heads, rule: Rule) -> dict[str, Any]:
    """Returns one rule for all KV heads, and the scores, as the kernels take them."""
    table = as_tensors(RuleTable.of([rule] * shape.kv_heads, MIN_WINDOW))
    return {"rules": table, "scores": Scores(shape.head_dim**-0.5)}


def kept_rule(n: int, share: float, elastic: bool = False) -> Rule:
    """Returns a rule with 16 sinks that holds this share of a cache of n tokens."""
    window = int(n * share) - 16
    return Rule(16, 0, (window << 10) // n) if elastic else Rule(16, window, 0)


def reading(bytes_: int) -> Callable[[], Any]:
    """Returns a call that reads this many bytes that are in no cache, with torch's threads."""
    pool = torch.ones(max(ROTATE_BYTES, 2 * bytes_) // 4)
    parts = itertools.cycle(pool.split(bytes_ // 4)[: pool.numel() * 4 // bytes_])
    return lambda: next(parts).sum()


def peak_flops() -> float:
    """Returns multiplications and additions a second that matrix products in float32 reach, by MKL or oneDNN."""
    size = 1024
    x, layer = torch.randn(size, size), torch.nn.Linear(size, size, bias=False).eval().requires_grad_(False)
    return 2 * size**3 / (min(timed([lambda: layer(x), lambda: onednn_product(x, layer.weight, None)], 9)) / 1e3)


def decode_pools(shape: Heads, n: int, batch: int, kv_parts: tuple[KVPart, KVPart]) -> Iterator[Any]:
    """Yields caches without end: pools that together are larger than any cache of the processor.

    The blocks of a KV head lie side by side, as after one prefill, or anywhere.
    """
    blocks = batch * shape.kv_heads * (n // BLOCK)
    bytes_ = blocks * sum(kv_part.nbytes for kv_part in kv_parts)
    pools = []
    for _ in range(max(2, -(-ROTATE_BYTES // bytes_))):
        keys, values = (memory(kv_part, blocks) for kv_part in kv_parts)
        ids = torch.randperm(blocks) if scattered else torch.arange(blocks)
        table = ids.to(torch.int32).view(batch, shape.kv_heads, n // BLOCK)
        pools.append(CacheView([keys], [values], table, shape.head_dim))
    return itertools.cycle(pools)


def memory(kv_part: KVPart, blocks: int) -> torch.Tensor:
    """Returns blocks of random numbers, or of random codes with the scales that such numbers have."""
    if not kv_part.bits:
        return torch.randn(blocks, BLOCK, kv_part.dim).to(kv_part.dtype)
    made = torch.randint(256, (blocks, kv_part.nbytes), dtype=torch.uint8)
    scales = made[:, -2 * BLOCK * 2 :].view(torch.float16)
    scales[:, :BLOCK], scales[:, BLOCK:] = 6 / 2**kv_part.bits, -3
    return made


def bench_decode(
    shape: Heads, n: int, batch: int, name: str, share: float, times: int, flops: float
) -> list[dict[str, Any]]:
    """Returns the rows of `decode` of a shape and dtype."""
    dtype, rule = DTYPES[name], kept_rule(n, share)
    query = torch.randn(batch, shape.heads, shape.head_dim).to(dtype)
    lengths, backend = torch.full((batch,), n), dispatch.backend_for(query)
    kv_parts = [
        (
            KVPart(FORMATS[key].code, shape.head_dim, dtype),
            KVPart(FORMATS[value].code, shape.head_dim, dtype, values=True),
        )
        for key, value in FORMATS_TIMED
    ]
    pools = [decode_pools(shape, n, batch, pair) for pair in kv_parts]

    def ours(number: int, rule: Rule) -> Callable[[], Any]:
        key, value = FORMATS_TIMED[number]
        chosen = arguments(shape, replace(rule, key_format=key, value_format=value))
        return lambda: backend.decode(query, cache=next(pools[number]), lengths=lengths, **chosen)

    def grouped() -> Any:
        k, v = (t[0].view(batch, shape.kv_heads, n, shape.head_dim) for t in next(pools[0])[:2])
        return F.scaled_dot_product_attention(query[:, :, None], k, v, enable_gqa=True)

    def packed() -> Any:
        k, v = (t[0].view(batch, shape.kv_heads, n, shape.head_dim) for t in next(pools[0])[:2])
        return F.scaled_dot_product_attention(query.view(batch, shape.kv_heads, -1, shape.head_dim), k, v)

    slots = int(rule.slots(n, MIN_WINDOW))
    held = [batch * shape.kv_heads * slots // BLOCK * sum(kv_part.nbytes for kv_part in pair) for pair in kv_parts]
    work = batch * shape.heads * 4 * shape.head_dim * int(rule.kept(n, MIN_WINDOW))
    numbers = range(len(FORMATS_TIMED))
    runs = [*(ours(i, rule) for i in numbers), *(ours(i, Rule.FULL) for i in numbers), *map(reading, held)]
    taken = timed(runs, times)
    sdpa = min(timed([grouped, packed], max(3, times // 4)))
    return [
        {
            "length": n,
            "batch": batch,
            "dtype": name,
            "bits": "/".join(str(kv_part.bits or 8 * dtype.itemsize) for kv_part in kv_parts[i]),
            "heads": str(shape),
            "kept": slots / n,
            "ms": taken[i],
            "native_ms": taken[0],
            "full_span_ms": taken[len(numbers) + i],
            "limit_ms": max(taken[2 * len(numbers) + i], work / flops * 1e3),
            "sdpa_best_ms": sdpa,
        }
        for i in numbers
    ]


def bench_prefill(shape: Heads, n: int, name: str, plan: str, times: int, sdpa_ms: float) -> dict[str, Any]:
    """Returns one row of `prefill`."""
    rule = {"full": Rule.FULL, "alpha": kept_rule(n, 0.25), "beta": kept_rule(n, 0.25, elastic=True)}[plan]
    query, key, value = chunk(shape, n, DTYPES[name])
    chosen, backend = arguments(shape, rule), dispatch.backend_for(query)
    counts = torch.arange(1, n + 1)
    seen = int(rule.kept(counts, MIN_WINDOW).sum())
    return {
        "length": n,
        "dtype": name,
        "heads": str(shape),
        "plan": plan,
        "visible_share": seen / int(counts.sum()),
        "ms": timed([lambda: prefill_alone(backend, query, key, value, **chosen)], times)[0],
        "sdpa_ms": sdpa_ms,
    }


def chunk(shape: Heads, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Returns query, key and value as a model's projections leave them."""
    counts = (shape.heads, shape.kv_heads, shape.kv_heads)
    return tuple(torch.randn(1, n, heads, shape.head_dim).to(dtype).transpose(1, 2) for heads in counts)


def sdpa_prefill_ms(shape: Heads, n: int, dtype: torch.dtype, times: int) -> float:
    """Returns the time of torch's causal attention on contiguous tensors."""
    query, key, value = (t.contiguous() for t in chunk(shape, n, dtype))
    attend = partial(F.scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=True)
    return timed([attend], times)[0]


def main() -> None:
    """Runs the command line."""
    parser = options(__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    parser.add_argument("--quick", action="store_true", help="the smaller shape, shorter and fewer times")
    parser.add_argument("--threads", type=int, help="threads of torch, all cores by default")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, its time on the core: for a busy machine")
    parser.add_argument("--scattered", action="store_true", help="decode: blocks at random places of the pool")
    parser.add_argument("--parts", default="decode,prefill", help="decode, prefill or both")
    chosen = parser.parse_args()
    global timed, scattered
    scattered, clock = chosen.scattered, time.thread_time if chosen.cpu_time else time.perf_counter
    timed = partial(medians_ms, clock=clock)
    if chosen.cpu_time:
        chosen.threads = 1
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    n, times = (2048, 5) if chosen.quick else (8192, 25)
    shapes = SHAPES[:1] if chosen.quick else SHAPES
    result: dict[str, Any] = {
        "kernel": dispatch.chosen().name,
        "isa": dispatch.chosen().isa,
        "threads": torch.get_num_threads(),
        "clock": clock.__name__,
        "scattered": scattered,
        "torch": torch.__version__,
        "decode": [],
        "prefill": [],
    }

    def note(part: str, row: dict[str, Any]) -> None:
        result[part].append(row)
        if not chosen.json:
            print(
                part,
                ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
                flush=True,
            )

    for shape, name in itertools.product(shapes, DTYPES) if "decode" in chosen.parts else ():
        flops = peak_flops()  # sums are in float32, whatever the storage
        for batch in (1, 8):
            for row in bench_decode(shape, n, batch, name, 0.25, times, flops):
                note("decode", row)
    for shape, name in itertools.product(shapes, DTYPES) if "prefill" in chosen.parts else ():
        few = max(2, times // 8)
        sdpa_ms = sdpa_prefill_ms(shape, n, DTYPES[name], few)
        for plan in ("full", "alpha", "beta"):
            note("prefill", bench_prefill(shape, n, name, plan, few, sdpa_ms))
    if chosen.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
