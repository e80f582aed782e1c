"""Random plans through random sequences of operations, cache and attention against attention with explicit masks.

`MOACOMPRESS_EXAMPLES=20000 pytest tests/runtime/test_property.py` looks longer and elsewhere than the 500 of `make test-all`.
"""

from __future__ import annotations

import heapq
import os
import types
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moacompress.core.errors import UnsupportedError
from moacompress.kernels.reference.rounding import round_to
from moacompress.rules.formats import FORMATS
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import MIN_WINDOWS, SINKS, Rule
from moacompress.rules.share import Share, reuse_layers_of, with_shared_rules
from moacompress.runtime.cache.block_runs import LAG
from moacompress.runtime.cache.plan_cache import PlanCache
from moacompress.runtime.decode.attention import attention_forward
from moacompress.runtime.decode.context import CONTEXT, LayerCall, LayerContext
from moacompress.runtime.hf.hooks import read_mask
from moacompress.runtime.sharing.shared_keys import SHARED_KEYS, AnchorKeys

GIVEN = os.environ.get("MOACOMPRESS_EXAMPLES")
EXAMPLES = [int(GIVEN)] if GIVEN else [30, pytest.param(500, marks=pytest.mark.heavy)]
DIM = 4
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""float64 runs in plain PyTorch, float32 by the compiled kernels where they are built."""
MODULE = types.SimpleNamespace(is_causal=True)

FORMAT = st.sampled_from(sorted(FORMATS))
SPANS = st.one_of(
    st.just(Rule.FULL),
    st.builds(Rule, st.sampled_from(SINKS), st.integers(0, 90), st.sampled_from([0, 0, 64, 200, 500, 1000])),
)
RULES = st.one_of(
    SPANS, st.builds(lambda rule, key, value: replace(rule, key_format=key, value_format=value), SPANS, FORMAT, FORMAT)
)

SELECT = st.sampled_from([(0, 0), (0, 0), (1, 0), (9, 0), (30, 0), (0, 200), (5, 500), (0, 1024)])


@st.composite
def plans(draw):
    kv_heads = draw(st.integers(1, 3))
    native = draw(st.sampled_from([None, None, None, 1, 7, 30, 70]))
    natives, heads = (None, native), kv_heads * draw(st.integers(1, 2))
    anchors = draw(st.lists(st.integers(0, 1), max_size=2))  # of the layers after these two
    natives += tuple(natives[anchor] for anchor in anchors)
    shape = ModelShape("llama", len(natives), heads, kv_heads, DIM, "float64", natives, "")
    rules = [tuple(draw(RULES) for _ in range(kv_heads)) for _ in natives]
    shares = [None, None]
    for anchor in anchors:
        head_map = draw(st.lists(st.integers(0, kv_heads - 1), min_size=kv_heads, max_size=kv_heads))
        shares.append(Share(anchor, tuple(head_map)))
    shares = tuple(shares) if anchors else ()
    if not anchors and draw(st.booleans()):
        for layer in [layer for layer, window in enumerate(natives) if window is None]:
            selects = [draw(SELECT) for _ in rules[layer]]
            rules[layer] = tuple(
                replace(rule, select_alpha=alpha, select_beta_q=beta_q)
                for rule, (alpha, beta_q) in zip(rules[layer], selects, strict=True)
            )
    return Plan(shape, draw(st.sampled_from(MIN_WINDOWS)), with_shared_rules(rules, shares), shares=shares)


@dataclass
class World:
    """A cache, and beside it all keys and values that were ever fed.

    `rows[r][layer]` are keys and values `[kv_heads, tokens, dim]` and scores `[kv_heads, tokens]` of the real tokens of row r;
    `real` is the whole mask; `longest` is how many real tokens each row ever had. Keys lie less `centres[layer]` in the cache,
    those of native formats too, where that changes nothing.
    """

    cache: PlanCache
    rows: list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]
    real: np.ndarray
    recorded: bool
    longest: np.ndarray
    centres: np.ndarray | None = None

    def centre(self, layer):
        return None if self.centres is None else self.centres[layer]

    @property
    def lengths(self):
        return np.array([row[0][0].shape[1] for row in self.rows])

    def fork(self, cache):
        rows = [list(row) for row in self.rows]
        return World(cache, rows, self.real.copy(), self.recorded, self.longest, self.centres)


def selected(rule, min_window, scores):
    """How many tokens have left when a gate begins to keep each, and when it ends; which have left at each query.

    `(entered, gone, left)`, int64 `[tokens]` each: token j is kept while `entered <= left < gone`.
    """
    n = len(scores)
    start = np.array([i - min(i, max(min_window, rule.alpha + rule.beta_q * i // 1024)) for i in range(1, n + 1)])
    left = np.maximum(start - rule.sink, 0)
    entered, gone = np.full(n, n + 1), np.zeros(n, int)
    heap, owner = [], []
    for number in range(1, int(left.max(initial=0)) + 1):
        token = rule.sink + number - 1
        if len(heap) < min(number, rule.select_alpha + rule.select_beta_q * number // 1024):
            place = len(owner)
            owner.append(token)
        elif heap and scores[token] > heap[0][0]:
            _, place = heapq.heappop(heap)
            gone[owner[place]], owner[place] = number, token
        else:
            continue
        heapq.heappush(heap, (scores[token], place))
        entered[token], gone[token] = number, n + 1
    return entered, gone, left


def expected(plan, layer, query, key, value, scored, centre):
    """Attention of the last rows of one sequence by the words of the definition: `[heads, tokens, dim]`.

    What is kept of keys is kept less their centre, `[kv_heads, dim]`, and they are whole again here.
    """
    heads, tokens, _ = query.shape
    n, group = key.shape[1], heads // plan.model.kv_heads
    out = torch.zeros(heads, tokens, DIM, dtype=query.dtype)
    i, j = np.arange(n - tokens, n)[:, None], np.arange(n)[None]
    native = plan.model.native_windows[layer]
    for head in range(heads):
        rule = plan.rules[layer][head // group]
        w = np.minimum(i + 1, np.maximum(plan.min_window, rule.alpha + rule.beta_q * (i + 1) // 1024))
        seen = (j <= i) & ((j < rule.sink) | (j > i - w))
        if native is not None:
            seen &= j > i - native
        if rule.selects:
            entered, gone, left = selected(rule, plan.min_window, scored[head // group].tolist())
            seen |= (j <= i) & (entered[j] <= left[i]) & (left[i] < gone[j])
        c = 0 if centre is None else torch.from_numpy(centre[head // group]).to(key.dtype)
        k, v = kept(key[head // group] - c, rule.key_format) + c, kept(value[head // group], rule.value_format)
        scores = query[head] @ k.T * DIM**-0.5
        weights = scores.masked_fill(~torch.from_numpy(seen), -torch.inf).softmax(-1)
        out[head] = weights @ v
    return out


def kept(x, name):
    """What is attended to of keys or values, `[tokens, dim]`, in a format."""
    return round_to(x, FORMATS[name].bits).to(x.dtype) if FORMATS[name].bits else x


def feed(plan, world, tokens, real, generator, same=False):
    """Runs one forward through cache and attention, and checks every output of a real token; `same`: of equal rows."""
    batch, shape = len(world.rows), plan.model
    mask = torch.from_numpy(np.concatenate([world.real, real], axis=1))
    if mask.all():
        mask = None
    world.cache.real = read_mask(mask, world.cache, batch, tokens)
    chunk_mask = None if real.all() else torch.from_numpy(real)
    shared_keys, chunks = AnchorKeys(with_gradients=False), {}
    for layer in range(shape.layers):
        dtype = world.rows[0][layer][0].dtype
        query = torch.randn(batch, shape.heads, tokens, DIM, generator=generator, dtype=dtype)
        key, value = (
            torch.randn(batch, shape.kv_heads, tokens, DIM, generator=generator, dtype=dtype) for _ in range(2)
        )
        few = 4 if layer else 30000  # ties in one layer
        scored = torch.randint(-few, few, key.shape[:3], generator=generator).to(torch.int16)
        if same:
            key, value, scored = (tensor[:1].expand_as(tensor).contiguous() for tensor in (key, value, scored))
        world.cache.update(key, value, layer)
        share = plan.share(layer)
        context = LayerContext.of(
            layer,
            plan.rules[layer],
            plan.min_window,
            shape.native_windows[layer],
            share,
            bool(reuse_layers_of(plan.shares, layer)),
            None if share is not None else world.centre(layer),
        )
        call = {CONTEXT: LayerCall(context, world.cache, scored if context.selects else None), SHARED_KEYS: shared_keys}
        found, _ = attention_forward(MODULE, query, key, value, chunk_mask, **call)
        found = found.transpose(1, 2)
        chunks[layer], centre = (query, key), world.centre(layer)
        if share is not None:
            its_query, its_key = chunks[share.anchor]
            key, heads = its_key[:, list(share.head_map)], list(share.head_map)
            centre = None if centre is None else world.centre(share.anchor)[heads]
            by_head = its_query.unflatten(1, (shape.kv_heads, -1))
            query = by_head[:, list(share.head_map)].flatten(1, 2)
        for row in range(batch):
            at = np.flatnonzero(real[row])
            before = world.rows[row][layer]
            k, v, s = (
                torch.cat((old, new[row][:, at]), 1) for old, new in zip(before, (key, value, scored), strict=True)
            )
            world.rows[row][layer] = k, v, s
            if len(at):
                wanted = expected(plan, layer, query[row][:, at], k, v, s, centre)
                assert (found[row][:, at] - wanted).abs().max() < TOLERANCE[dtype]
            assert not found[row][:, :-1][:, ~real[row, :-1]].any()
            if not real[row, -1]:  # generate continues from the last column: it sees what the last real token sees
                wanted = expected(plan, layer, query[row][:, -1:], k, v, s, centre) if k.shape[1] else 0.0
                assert (found[row][:, -1:] - wanted).abs().max() < TOLERANCE[dtype]
    world.real = np.concatenate([world.real, real], axis=1)
    world.longest = np.maximum(world.longest, world.lengths)


def crop(plan, world, count):
    """Rolls back, which must work to within the lag of the longest that a recording cache was, and may be refused beyond."""
    columns = world.real.shape[1]
    removed = world.real[:, columns - count :].sum(1)
    before = [layer.blocks for layer in world.cache.layers]
    try:
        world.cache.crop(-count)
    except UnsupportedError:
        assert not (world.recorded and (world.longest - (world.lengths - removed) <= LAG).all())
        assert [layer.blocks for layer in world.cache.layers] == before, "all layers or none"
        return
    world.real = world.real[:, : columns - count]
    for row, gone in zip(world.rows, removed.tolist(), strict=True):
        for layer, of_layer in enumerate(row):
            row[layer] = tuple(tensor[:, : tensor.shape[1] - gone] for tensor in of_layer)


@pytest.mark.parametrize("dtype", sorted(TOLERANCE, key=str), ids=str)
def test_sinks_outlast_a_roll_back(dtype):
    """A native window has left them when a roll back ends, and a second one may go back to where it had not."""
    shape = ModelShape("llama", 1, 2, 2, DIM, "float64", (70,), "")
    plan = Plan(shape, 16, ((Rule.FULL, Rule(4, 0, 0)),))
    cache, generator = PlanCache(plan), torch.Generator().manual_seed(0)
    cache.activate_past_recording()
    empty, unscored = torch.zeros(2, 0, DIM, dtype=dtype), torch.zeros(2, 0, dtype=torch.int16)
    world = World(cache, [[(empty, empty, unscored)]], np.zeros((1, 0), bool), True, np.zeros(1, int))
    feed(plan, world, 160, np.ones((1, 160), bool), generator)
    crop(plan, world, 76)
    for _ in range(3):
        feed(plan, world, 1, np.ones((1, 1), bool), generator)
        check_blocks(plan, [world])
    crop(plan, world, 27)
    assert world.lengths == [60]
    feed(plan, world, 1, np.ones((1, 1), bool), generator)


def select(world, rows):
    world.rows = [list(world.rows[row]) for row in rows]
    world.real, world.longest = world.real[rows], world.longest[rows]


def touched(rule, min_window, native, lengths, blocks):
    """Which of the first blocks hold a token that the last query of so many tokens sees: bool `[lengths, blocks]`."""
    n, begin = lengths[:, None], 16 * np.arange(blocks)[None]
    end = np.minimum(begin + 16, n)
    begin = begin if native is None else np.maximum(begin, n - native)
    window = np.maximum(min_window, rule.alpha + rule.beta_q * n // 1024)
    return (np.maximum(begin, n - window) < end) | (begin < np.minimum(end, rule.sink))


def check_blocks(plan, worlds):
    """A cache holds just the blocks that its plan touches; one that records, those of all lengths it can be rolled back to.

    It can be rolled back to `LAG` tokens before the longest that a row ever was, and where gates select it holds what twice
    that needs, but for what was gone when it began to. Of what a native window has left since then it may hold more, in no
    more blocks than these tokens take. Every block that a table names is counted.
    """
    for world in worlds:
        for layer, cache_layer in enumerate(world.cache.layers):
            assert (cache_layer.lengths == world.lengths).all()
            if plan.share(layer) is not None:  # its values lie in its anchor's blocks
                continue
            ids, native = cache_layer.held.table.ids, plan.model.native_windows[layer]
            for row, (n, longest) in enumerate(zip(world.lengths, world.longest, strict=True)):
                selects = any(rule.selects for rule in plan.rules[layer])
                lag = LAG * (1 + selects)
                first = min(n, max(longest - lag, 0)) if world.recorded else n
                for head, rule in enumerate(plan.rules[layer]):
                    wanted = touched(rule, plan.min_window, native, np.arange(first, n + 1), ids.shape[2]).any(axis=0)
                    held = ids[row, head] >= 0
                    assert not (wanted & ~held).any() or (selects and world.recorded)
                    assert (held & ~wanted).sum() <= (LAG // 16 if world.recorded and native is not None else 0)
    anchors = [
        cache_layer
        for world in worlds
        for layer, cache_layer in enumerate(world.cache.layers)
        if plan.share(layer) is None
    ]
    pools = {id(layer.held.pool): layer.held.pool for layer in anchors}
    for pool in pools.values():
        own = [layer.held for layer in anchors if layer.held.pool is pool]
        tables = [table for held in own for table in (*held.tables, *(each.selected for each in held.past))]
        named = np.concatenate([table.ids.reshape(-1) for table in tables])
        counts = np.bincount(named[named >= 0], minlength=len(pool.refs))
        assert (np.minimum(counts, 1) == np.minimum(pool.refs, 1)).all()
        assert not pool.shared or (counts == pool.refs).all()


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_sequence_of_operations(examples):
    settings(
        max_examples=examples,
        deadline=None,
        derandomize=GIVEN is None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )(given(st.data())(run_any_sequence))()


def run_any_sequence(data):
    plan = data.draw(plans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    batch = data.draw(st.integers(1, 3))
    dtype = data.draw(st.sampled_from(sorted(TOLERANCE, key=str)))
    empty = torch.zeros(plan.model.kv_heads, 0, DIM, dtype=dtype)
    unscored = torch.zeros(plan.model.kv_heads, 0, dtype=torch.int16)
    cache = PlanCache(plan, reserve=data.draw(st.sampled_from([None, 40, 200])))
    recorded = data.draw(st.booleans())
    if recorded:
        cache.activate_past_recording()
    rows = [[(empty, empty, unscored)] * plan.model.layers for _ in range(batch)]
    norm, shape = data.draw(st.sampled_from([0, 1, 100])), plan.model
    drawn = np.random.default_rng(norm).standard_normal((shape.layers, shape.kv_heads, DIM)).astype(np.float32)
    centres = norm * drawn / np.linalg.norm(drawn, axis=-1, keepdims=True) if norm else None
    worlds = [World(cache, rows, np.zeros((batch, 0), bool), recorded, np.zeros(batch, int), centres)]
    for step in range(data.draw(st.integers(2, 9))):
        world = worlds[data.draw(st.integers(0, len(worlds) - 1))]
        rows, columns = world.real.shape
        operation = (
            "feed"
            if not step
            else data.draw(
                st.sampled_from(
                    ["feed", "feed", "step", "step", "pad", "reorder", "repeat", "select", "crop", "fork", "record"]
                )
            )
        )
        if operation == "feed":
            tokens = data.draw(st.one_of(st.integers(1, 110), st.integers(LAG, 2 * LAG)))
            feed(plan, world, tokens, np.ones((rows, tokens), bool), generator, same=data.draw(st.booleans()))
        elif operation == "step":
            for _ in range(data.draw(st.integers(1, 20))):
                feed(plan, world, 1, np.ones((rows, 1), bool), generator)
        elif operation == "pad":
            tokens = data.draw(st.integers(1, 40))
            kind = data.draw(st.sampled_from(["left", "right", "holes"]))
            real = np.ones((rows, tokens), bool)
            for row in range(rows):
                if kind == "holes":
                    real[row] = np.array(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
                else:
                    pads = data.draw(st.integers(0, tokens))
                    real[row, slice(0, pads) if kind == "left" else slice(tokens - pads, tokens)] = False
            feed(plan, world, tokens, real, generator)
        elif operation in ("reorder", "select"):
            size = rows if operation == "reorder" else data.draw(st.integers(1, rows))
            picks = data.draw(st.lists(st.integers(0, rows - 1), min_size=size, max_size=size))
            (world.cache.reorder_cache if operation == "reorder" else world.cache.batch_select_indices)(
                torch.tensor(picks)
            )
            select(world, picks)
        elif operation == "repeat" and rows <= 2:
            world.cache.batch_repeat_interleave(2)
            select(world, np.arange(rows).repeat(2).tolist())
        elif operation == "crop":
            crop(plan, world, data.draw(st.integers(0, min(columns, 150))))
        elif operation == "fork" and len(worlds) < 3:
            worlds.append(world.fork(world.cache.fork()))
        elif operation == "record" and not columns:
            world.cache.activate_past_recording()
            world.recorded = True
        check_blocks(plan, worlds)
