"""One token of every row goes into the cache by a compiled call: it leaves and says what the Python path does."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor, TimeoutError

import numpy as np
import pytest
import torch

from moacompress.kernels.arguments import Scores, as_tensors
from moacompress.kernels.cpu import library
from moacompress.kernels.cpu.cpu_backend import CpuBackend
from moacompress.rules.windows import BLOCK
from moacompress.runtime.cache.layer_cache import PlanCacheLayer
from moacompress.runtime.cache.real_tokens import Chunk
from tests.kernels.test_step_layer import random_rules

HEADS, GROUP, DIM, VALUE_DIM = 3, 2, 5, 7
SCORES, CPU = Scores(0.4), CpuBackend()

pytestmark = pytest.mark.usefixtures("compiled_kernels")


def pair(rng, lag=False, reserve=None, formats=False):
    """Two empty layers with the same random rules."""
    rules = random_rules(rng, HEADS, formats)
    layers = [PlanCacheLayer(rules, reserve) for _ in range(2)]
    for layer in layers:
        layer.record_past = lag
    return layers


def feed(layers, key, value, real=None, scores=SCORES):
    """Feeds both; where a single token is all that is fed, the first layer steps and both must say the same.

    Returns:
        Whether the first layer did step.
    """
    rows, _, tokens, _ = key.shape
    for layer in layers:
        layer.update(key, value, 0)
    query, out = torch.randn(rows, HEADS * GROUP, tokens, DIM).to(key.dtype), None
    if tokens == 1:
        rest = {"rules": as_tensors(layers[0].rules), "scores": scores}
        if layers[0].can_step(query):
            out = layers[0].step_pending(lambda state: CPU.step(query, key, value, cache=state, **rest))
    for layer in layers if out is None else layers[1:]:
        layer.commit(Chunk.of(real, tokens))
    if out is not None:
        lengths = torch.from_numpy(layers[1].lengths)
        wanted, _ = CPU.decode(query[:, :, 0], cache=layers[1].held.view(), lengths=lengths, **rest)
        assert torch.equal(out, wanted[:, None])
    return out is not None


def filled():
    """A layer with 20 tokens of two rows."""
    layer, _ = pair(random.Random(1))
    feed([layer], torch.randn(2, HEADS, 20, DIM), torch.randn(2, HEADS, 20, VALUE_DIM))
    return layer


def contents(layer):
    """Tokens of keys and values in the order of the table, infinite where there is none, 0 behind the last token.

    `[rows, heads, blocks, 16, numbers]`; of codes the numbers are their bytes, and those of scale and zero point.
    """
    found, pool = [], layer.held.pool
    ids = torch.from_numpy(layer.held.table.ids).long()
    for side, segments in enumerate((pool.keys, pool.values)):
        most = max(DIM, VALUE_DIM) + 4
        tokens = torch.full((len(pool.refs), BLOCK, most), 0.0, dtype=torch.float64)
        first = 0
        for memory in segments:
            half = pool.layout.kinds[pool.kinds[first]][side]
            joined = memory.double()
            if half.bits:
                codes = half.kept(memory, torch.arange(len(memory))[:, None].expand(-1, BLOCK), torch.arange(BLOCK))
                joined = torch.cat([codes.codes, *(part.view(torch.int16) for part in codes[1:])], -1).double()
            tokens[first : first + len(memory), :, : joined.shape[-1]] = joined
            first += len(memory)
        blocks = torch.where(ids[..., None, None] < 0, torch.inf, tokens[ids.clamp_min(0)])
        for row, n in enumerate(layer.lengths):
            if n % BLOCK:
                blocks[row, :, n // BLOCK, n % BLOCK :] = 0
        found.append(blocks)
    return found


def assert_equal(one, other):
    assert np.array_equal(one.lengths, other.lengths)
    assert np.array_equal(one.held.runs, other.held.runs)
    width = -(-int(one.lengths.max()) // BLOCK)
    for a, b in zip(contents(one), contents(other), strict=True):
        assert torch.equal(a[:, :, :width], b[:, :, :width])
        assert a[:, :, width:].isinf().all()
        assert b[:, :, width:].isinf().all()


def assert_counted(*layers):
    """Every block of a pool is counted as often as these layers name it."""
    pool = layers[0].held.pool
    ids = np.concatenate([layer.held.table.ids.reshape(-1) for layer in layers])
    assert np.array_equal(np.bincount(ids[ids >= 0], minlength=len(pool.refs)), pool.refs)


@pytest.mark.parametrize("formats", [False, True])
@pytest.mark.parametrize("seed", range(9))
def test_it_does_what_the_python_path_does(seed, formats, isa):
    """Chunks with padding, single tokens, beams that share blocks, drafts that are rolled back; every dtype and layout.

    Codes, scales and zero points are those of the Python path, to the bit, for every instruction set.
    """
    isa(library.ISAS[-1 - seed // 3 % len(library.ISAS)])
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype = library.DTYPES[seed % 3]
    lag, rows = rng.random() < 0.5, rng.choice((1, 2, 3))
    layers = pair(rng, lag, rng.choice((None, 200)), formats)
    logits = torch.randn(HEADS * GROUP)
    scores = Scores(rng.choice((0.2, 1.0)), rng.choice((0.0, 3.0)), rng.choice((None, logits)))
    steps = 0
    for step in range(14):
        tokens = rng.choice((1, 1, 1, 5, 40, 100)) if step else 30
        real = None
        if tokens > 1 and rng.random() < 0.3:
            real = torch.ones(rows, tokens, dtype=torch.bool)
            real[0, : rng.randint(1, tokens - 1)] = False
        for _ in range(rng.randint(1, 40) if tokens == 1 else 1):
            key = torch.randn(rows, tokens, HEADS, DIM + 2).to(dtype).transpose(1, 2)[..., 1:-1]
            steps += feed(layers, key, torch.randn(rows, HEADS, tokens, VALUE_DIM).to(dtype), real, scores)
            assert_equal(*layers)
            for layer in layers:
                assert_counted(layer)
        if rng.random() < 0.3:
            order = np.array([rng.randrange(rows) for _ in range(rows)])
            for layer in layers:
                layer.select(order)
        if lag and rng.random() < 0.3:
            counts = np.full(rows, min(rng.randint(1, 20), int(layers[0].lengths.min())))
            for layer in layers:
                layer.roll_back(counts, int(counts[0]))
        assert_equal(*layers)
    assert steps > 10


def test_a_pool_that_grows_in_another_thread_is_not_seen_halfway():
    layer = filled()
    pool = layer.held.pool
    with ThreadPoolExecutor(1) as threads:
        with layer.lock:
            pool.keys.append(torch.zeros(1, BLOCK, DIM))
            read = threads.submit(layer.held.view)
            with pytest.raises(TimeoutError):
                read.result(timeout=0.2)
            pool.values.append(torch.zeros(1, BLOCK, VALUE_DIM))
        keys, values, *_ = read.result(timeout=30)
    assert len(keys) == len(values)


def test_bad_arguments_are_refused():
    layer = filled()
    pool, state = layer.held.pool, (layer.held.table.ids, layer.lengths, layer.held.runs, layer.held.pool.refs)
    tensors = ("query", "key", "value", "keys", "values", "table", "lengths", "runs", "refs")
    names = (*tensors, "rules", "lag", "scaling", "softcap", "logits", "chosen", "scores")
    token = (torch.randn(2, heads, 1, dim) for heads, dim in ((HEADS * GROUP, DIM), (HEADS, DIM), (HEADS, VALUE_DIM)))
    held = (pool.keys, pool.values, *map(torch.from_numpy, state))
    good = dict(zip(names, (*token, *held, as_tensors(layer.rules).columns, 0, *SCORES, [], None), strict=True))
    before = [array.copy() for array in state]

    def refused(match, **changes):
        with pytest.raises(RuntimeError, match=match):
            torch.ops.moacompress_cpu.step(*(good | changes).values())
        assert all(np.array_equal(a, b) for a, b in zip(before, state, strict=True))

    refused("5 query heads are no multiple of 3 KV heads", query=good["query"][:, 1:])
    refused("the shape", key=good["key"].repeat(1, 1, 2, 1))
    refused("another dtype", value=good["value"].half())
    refused("segments of keys and 0 of values", values=[])
    refused("the shape", keys=[torch.zeros(1, 16, DIM + 1)])
    refused("blocks of keys and", refs=good["refs"][:-1].clone())
    refused("table has another dtype", table=good["table"].long())
    refused("runs has the shape", runs=good["runs"][:1])
    refused("row 1 has -1 tokens", lengths=torch.tensor([20, -1]))
    refused("table of rules has the shape", rules=good["rules"][:, :1].contiguous())
    refused("min_window is 0", rules=good["rules"] * torch.tensor([1, 1, 1, 0, *[1] * 5])[:, None])
    refused("lag is -1", lag=-1)
    refused("scaling is 0", scaling=0.0)
    refused("sink_logits has the shape", logits=torch.zeros(HEADS))
    refused("0 parts of what gates select; at least 3", scores=torch.zeros(2, HEADS, dtype=torch.int16))
    assert torch.ops.moacompress_cpu.step(*good.values())[1] in (0, 1)
