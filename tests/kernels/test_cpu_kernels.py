"""The compiled kernels equal the reference on random inputs, whatever the instruction set, the threads and the batch."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from moacompress.kernels.arguments import CacheView, Scores, as_tensors
from moacompress.kernels.backend import Backend
from moacompress.kernels.cpu import library
from moacompress.kernels.cpu.cpu_backend import CpuBackend
from moacompress.kernels.dispatch import REFERENCE
from moacompress.kernels.kv_parts import KVPart
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.selection import NEVER, competing_tokens, eviction_schedule
from moacompress.rules.windows import block_runs, selected, visible_intervals

pytestmark = pytest.mark.usefixtures("isa")
"""Skips where the kernels cannot run, and leaves the best instruction set behind."""

OPS = torch.ops.moacompress_cpu
LSE_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-3, torch.float16: 2e-3}
"""Of codes: where the processor multiplies bytes, queries of 16 bits are whole numbers of as many."""
CPU = CpuBackend()


@pytest.mark.parametrize("kind", ["native", "formats", "gates"])
@pytest.mark.seeds(320)
def test_random_configurations(seed, kind, random_case, close, isa, poisoned_memory):
    """Prefill and decode; where gates keep tokens of the past or of the chunk, prefill in both kinds of formats."""
    isa(library.ISAS[seed % len(library.ISAS)])
    dtype, coded = library.DTYPES[seed // 5 % 3], kind == "formats" or (kind == "gates" and seed // 15 % 2)
    native = {"native_window": 0} if kind == "gates" else {}
    case = random_case(seed, dtype, formats="any" if coded else None, **native)
    if kind == "gates":
        case = case.keeping(random.Random(seed))
    exact, lse_error = case.to(torch.float64), 1e-4 if kind == "native" else LSE_ERROR[dtype]
    close(OPS.prefill(*case.prefill), exact.prefilled(), dtype, lse_error)
    if kind != "gates":
        close(OPS.decode(*case.decode), exact.decoded(), dtype, lse_error)


@pytest.mark.seeds(60)
def test_tokens_are_put_where_they_belong(seed, isa):
    """Of one KV head or of several, into blocks that lie apart, and into nothing else."""
    isa(library.ISAS[seed % len(library.ISAS)])
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype, dim, count = library.DTYPES[seed % 3], rng.choice((9, 16, 20, 33, 64, 80, 256)), rng.choice((0, 1, 40, 700))
    parts, values = rng.choice((1, 3)), rng.random() < 0.5
    kv_parts = [KVPart(rng.choice((0, 1, 2, 3)), dim, dtype, values) for _ in range(parts)]
    gap = rng.choice((0, 64))
    spacious = [torch.zeros(60, kv_part.nbytes + gap, dtype=torch.uint8) for kv_part in kv_parts]

    def view(kv_part, blocks):
        used = blocks[:, : kv_part.nbytes]
        return used if kv_part.bits else used.view(dtype).unflatten(1, (16, dim))

    def views(memory):
        return [view(kv_part, blocks) for kv_part, blocks in zip(kv_parts, memory, strict=True)]

    slots = torch.stack([torch.randperm(60 * 16)[:count] for _ in kv_parts], 1)
    vectors = torch.randn(count, parts + 1, dim + 3, dtype=dtype)[:, 1:, 2:-1]
    expected = [blocks.clone() for blocks in spacious]
    Backend.put(CPU, kv_parts, views(expected), slots, vectors)
    CPU.put(kv_parts, views(spacious), slots, vectors)
    for ours, theirs in zip(spacious, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_put_refuses_what_does_not_fit():
    part, vectors = KVPart(1, 16, torch.float32), torch.randn(1, 1, 16)
    memory = torch.zeros(4, part.nbytes, dtype=torch.uint8)
    for given, slot, message in (
        ([memory], 64, "slot 64 of 4 blocks"),
        ([memory, memory], 0, "2 memories of 1 parts"),
        ([memory[:, :-1]], 0, "memory has the shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            CPU.put([part], given, torch.tensor([[slot]]), vectors)


@pytest.mark.seeds(60)
def test_tokens_are_evicted_as_in_the_definition(seed):
    rng = random.Random(seed)
    width, rows, heads = rng.choice((3, 50, 30000)), rng.choice((0, 1, 3)), rng.choice((1, 4))
    counts = ((0, 0), (1, 0), (7, 0), (40, 0), (0, 100), (5, 300), (0, 1024))
    rules = [Rule(rng.choice((0, 4)), 0, 0, "native", "native", *rng.choice(counts)) for _ in range(heads)]
    table, pairs = RuleTable.of(rules, 1), [*np.ndindex(rows, heads)]
    left, leaving = (
        np.array([rng.choice((0, 0, rng.randint(0, most))) for _ in pairs], np.int64).reshape(rows, heads)
        for most in (300, 400)
    )
    tokens = competing_tokens(table, left, left + leaving)
    scores = np.array([rng.randint(-width, width) for _ in tokens.positions], np.int64)
    ours, theirs = (each(tokens, table, scores) for each in (CPU.eviction_schedule, eviction_schedule))
    for name in ("evicted", "places"):
        assert (getattr(ours, name) == getattr(theirs, name)).all()
    for row, head in pairs:
        alone, rule = theirs.of_rows(np.array([row])).of_head(0, head), rules[head]
        places, count = alone.places[alone.evicted == NEVER], (left + leaving)[row, head] if rule.selects else 0
        assert sorted(places.tolist()) == [*range(selected(count, rule.select_alpha, rule.select_beta_q))]


@pytest.mark.parametrize("name", library.ISAS)
@pytest.mark.parametrize(
    ("dtype", "formats"), [*((dtype, None) for dtype in library.DTYPES), (torch.bfloat16, [(1, 2), (2, 0)])]
)
def test_threads_and_batch_change_no_bit(name, dtype, formats, random_case, isa, threads):
    isa(name)
    sizes = {"rows": 3, "kv_heads": 2, "group": 3, "tokens": 100, "past": 350, "native_window": 0, "valid": 90}
    case = random_case(11, dtype, **sizes, formats=formats)
    keeping = case.keeping(random.Random(4))
    results, selected = [], []
    for count in (1, 17, 2):
        threads(count)
        results.append((*OPS.decode(*case.decode), *OPS.prefill(*case.prefill)))
        selected.append(OPS.prefill(*keeping.prefill))
    for first, other in ((each[0], another) for each in (results, selected) for another in each[1:]):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for row in range(3):
        alone = case.row(row)
        found = (*OPS.decode(*alone.decode), *OPS.prefill(*alone.prefill))
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(results[0], found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_40_000_tokens(dtype, close):
    """As decode, and as the past of a chunk."""
    torch.manual_seed(3)
    n, dim = 40_000, 64
    query, key, value = (torch.randn(1, heads, 20, dim).to(dtype) for heads in (3, 1, 1))
    pool = torch.randn(n // 16, 16, dim).to(dtype)
    table = torch.randperm(n // 16).to(torch.int32).view(1, 1, -1)
    for rule in (Rule.FULL, Rule(64, 1000, 256)):
        rest = {"rules": as_tensors(RuleTable.of([rule], 16)), "scores": Scores(dim**-0.5), "with_lse": True}
        exact = [t.double() for t in (query, key, value, pool)]
        cache, wide = CacheView([pool], [pool], table), CacheView([exact[3]], [exact[3]], table)
        lengths = torch.tensor([n])
        expected = REFERENCE.decode(exact[0][:, :, 0], cache=wide, lengths=lengths, **rest)
        close(CPU.decode(query[:, :, 0], cache=cache, lengths=lengths, **rest), expected, dtype)
        rest |= {"past": lengths, "valid": torch.tensor([20])}
        expected = REFERENCE.prefill(*exact[:3], cache=wide, **rest)
        close(CPU.prefill(query, key, value, cache=cache, **rest), expected, dtype)


def test_large_scores_do_not_overflow(close):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 90, 32) * 40 for _ in range(3))
    rest = {"past": torch.tensor([0]), "valid": torch.tensor([90]), "scores": Scores(1.0), "with_lse": True}
    rest |= {"cache": CacheView.empty(key), "rules": as_tensors(RuleTable.of([Rule(4, 30, 0)], 16))}
    found = CPU.prefill(query, key, value, **rest)
    wanted, wanted_lse = REFERENCE.prefill(query.double(), key.double(), value.double(), **rest)
    assert ((found[0] - wanted).abs() / (1 + wanted.abs())).max() < 1e-2  # scores of thousands have an ulp of 2e-4
    assert ((found[1] - wanted_lse).abs() / wanted_lse.abs()).max() < 1e-5


def test_intervals_and_blocks_are_as_in_the_plan():
    rng = random.Random(0)
    for _ in range(3000):
        n = rng.choice([0, 1, rng.randint(0, 300), rng.randint(0, 1 << 24)])
        rule = Rule(rng.choice([4, 16, 64]), rng.choice([0, 100, 1 << 24]), rng.choice([0, 1, 500, 1023, 1024]))
        min_window, native = rng.choice([16, 64]), rng.choice([None, 1, 50, 4096])
        span = rule.span(min_window, native)
        expected = [[x for pair in find(n, span) for x in pair] for find in (visible_intervals, block_runs)]
        assert [*library.visible(n, RuleTable.of([rule], min_window, native))] == expected


def test_bad_arguments_are_refused(random_case):
    sizes = {"rows": 1, "past": 100, "kv_heads": 2, "group": 2, "dim": 64, "tokens": 2, "valid": 2}
    case = random_case(1, torch.float32, native_window=0, **sizes)

    def refused(match, **changes):
        with pytest.raises(RuntimeError, match=match):
            OPS.decode(*replace(case, **changes).decode)

    OPS.decode(*case.decode)
    refused("a block that a query sees has no id", table=torch.full_like(case.table, 10_000))
    refused("table has another dtype", table=case.table.long())
    refused(r"lengths has the shape \[2\], not \[1\]", past=torch.tensor([1, 2]))
    refused("row 0 has -1 tokens", past=torch.tensor([-1]))
    one = torch.tensor([4])
    refused(r"table of rules has the shape \[9, 1\], not \[9, 2\]", sink=one, alpha=one, beta_q=one)
    refused("KV head 0 has sink 4, alpha -1", sink=torch.tensor([4, 4]), alpha=torch.tensor([-1, 0]))
    refused("scaling is 0, not positive", scaling=0.0)
    refused("query must be float32, bfloat16 or float16", query=case.query.double())
    refused("keys has another dtype", keys=[t.half() for t in case.keys])
    refused("segments of keys and 0 of values", values=[])
    refused(r"has the shape \[\d+, 16, 64\], not \[any, 16, 32\]", query=case.query[..., :32])
    refused("4 query heads are no multiple of 3 KV heads", table=case.table[:, :1].expand(1, 3, -1).contiguous())
    with pytest.raises(RuntimeError, match="100 tokens before the chunk and 3 real ones of 2"):
        OPS.prefill(*replace(case, valid=torch.tensor([3])).prefill)
    with pytest.raises(RuntimeError, match="last dimension of query must be contiguous"):
        OPS.prefill(*replace(case, query=case.query.mT.contiguous().mT).prefill)
