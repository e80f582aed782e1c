"""State machines of the cache: random plans through random operations, checked against plain references.

`AttentionMachine` feeds random queries, keys and values to a cache and compares attention with explicit masks. `ModelMachine`
feeds tokens to a tiny model by each decode route and compares logits with rows that were read alone, at once, without a cache,
by the kernels in plain PyTorch. `MOACOMPRESS_EXAMPLES=20000 pytest tests/runtime/test_property.py` searches longer, and in
other places, than `make test-all`.
"""

from __future__ import annotations

import heapq
import os
import pickle
import types
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from moacompress.core.errors import UnsupportedError
from moacompress.kernels import dispatch
from moacompress.kernels.reference.rounding import round_to
from moacompress.models.source import model_shape
from moacompress.rules.formats import FORMATS
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import MIN_WINDOWS, SINKS, Rule
from moacompress.rules.share import Share, reuse_layers_of, with_shared_rules
from moacompress.runtime import attach
from moacompress.runtime.cache.block_runs import LAG
from moacompress.runtime.cache.plan_cache import PlanCache
from moacompress.runtime.decode import routes
from moacompress.runtime.decode.attention import attention_forward
from moacompress.runtime.decode.context import CONTEXT, LayerCall, LayerContext
from moacompress.runtime.hf.hooks import read_mask
from moacompress.runtime.sharing.shared_keys import SHARED_KEYS, AnchorKeys
from tests.plan_kinds import random_centres

GIVEN = os.environ.get("MOACOMPRESS_EXAMPLES")
DIM = 4
MODULE = types.SimpleNamespace(is_causal=True)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Of attention, absolute."""
LOGIT_TOLERANCE = {
    torch.float32: {"native": 3e-5, "int8": 5e-3, "int4": 0.1, "mixed": 0.1, "gates": 3e-5, "shares": 3e-5},
    torch.bfloat16: {"native": 0.06, "int8": 0.1, "int4": 0.3, "mixed": 0.3, "shares": 0.06},
}
"""Of logits, by kind of plan, as a share of the largest: where a code falls on the other side of a step they differ by more."""
DTYPES = {
    "reference": (torch.float64, torch.float32, torch.bfloat16),
    "cpu": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16),
}
"""By backend."""

MIXED = "mixed"
KINDS = (*FORMATS, MIXED)
SPANS = st.one_of(
    st.just(Rule.FULL),
    st.builds(Rule, st.sampled_from(SINKS), st.integers(0, 90), st.sampled_from([0, 0, 64, 200, 500, 1000])),
)
SELECT = st.sampled_from([(0, 0), (0, 0), (1, 0), (9, 0), (30, 0), (0, 200), (5, 500), (0, 1024)])


@st.composite
def rules_of(draw, shape, kind):
    """Draws `rules[layer][kv_head]` whose formats are all of one kind, or any where that is `MIXED`."""

    def draw_rule():
        names = [draw(st.sampled_from(sorted(FORMATS))) if kind == MIXED else kind for _ in range(2)]
        return replace(draw(SPANS), key_format=names[0], value_format=names[1])

    return [tuple(draw_rule() for _ in range(shape.kv_heads)) for _ in range(shape.layers)]


@st.composite
def selecting(draw, shape, rules):
    """Draws what gates keep beside given rules, on layers without a native window."""
    found = list(rules)
    for layer in [layer for layer, window in enumerate(shape.native_windows) if window is None]:
        selects = [draw(SELECT) for _ in found[layer]]
        found[layer] = tuple(
            replace(each, select_alpha=alpha, select_beta_q=beta_q)
            for each, (alpha, beta_q) in zip(found[layer], selects, strict=True)
        )
    return found


@st.composite
def plans(draw):
    kv_heads = draw(st.integers(1, 3))
    native = draw(st.sampled_from([None, None, None, 1, 7, 30, 70]))
    natives, heads = (None, native), kv_heads * draw(st.integers(1, 2))
    anchors = draw(st.lists(st.integers(0, 1), max_size=2))  # of the layers after these two
    natives += tuple(natives[anchor] for anchor in anchors)
    shape = ModelShape("llama", len(natives), heads, kv_heads, DIM, "float64", natives, "")
    rules = draw(rules_of(shape, draw(st.sampled_from(KINDS))))
    shares = [None, None]
    for anchor in anchors:
        head_map = draw(st.lists(st.integers(0, kv_heads - 1), min_size=kv_heads, max_size=kv_heads))
        shares.append(Share(anchor, tuple(head_map)))
    shares = tuple(shares) if anchors else ()
    if not anchors and draw(st.booleans()):
        rules = draw(selecting(shape, rules))
    return Plan(shape, draw(st.sampled_from(MIN_WINDOWS)), with_shared_rules(rules, shares), shares=shares)


@dataclass
class World:
    """A cache, and beside it all that was ever fed.

    Every tensor of `rows[r]` holds the real tokens of row r along its second dimension; `real` is the whole mask; `longest` is
    how many real tokens each row ever had.
    """

    cache: PlanCache
    rows: list[list[torch.Tensor]]
    real: np.ndarray
    recorded: bool
    longest: np.ndarray

    @staticmethod
    def begin(cache, row, batch, recorded):
        return World(cache, [row] * batch, np.zeros((batch, 0), bool), recorded, np.zeros(batch, int))

    @property
    def lengths(self):
        return np.array([row[0].shape[1] for row in self.rows])

    def count(self, real):
        """Takes note of columns that were fed, whose tokens are in `rows` already."""
        self.real = np.concatenate([self.real, real], axis=1)
        self.longest = np.maximum(self.longest, self.lengths)

    def select(self, rows):
        self.rows = [self.rows[row] for row in rows]
        self.real, self.longest = self.real[rows], self.longest[rows]

    def join(self, other):
        """Rows are padded on the left to the longest, less columns that none of them needs."""
        columns = max(self.real.shape[1], other.real.shape[1])
        real = np.concatenate([np.pad(one.real, ((0, 0), (columns - one.real.shape[1], 0))) for one in (self, other)])
        self.real = real[:, real.any(axis=0).argmax() :]
        self.rows += other.rows
        self.longest = np.concatenate([self.longest, other.longest])

    def crop(self, count):
        """Rolls back: to within the lag of the longest that a recording cache was this must work, beyond it may be refused."""
        columns = self.real.shape[1]
        removed = self.real[:, columns - count :].sum(1)
        before = [layer.blocks for layer in self.cache.layers]
        try:
            self.cache.crop(-count)
        except UnsupportedError:
            assert not (self.recorded and (self.longest - (self.lengths - removed) <= LAG).all())
            assert [layer.blocks for layer in self.cache.layers] == before, "all layers or none"
            return
        self.real = self.real[:, : columns - count]
        ends = (self.lengths - removed).tolist()
        self.rows = [[tensor[:, :end] for tensor in row] for row, end in zip(self.rows, ends, strict=True)]

    def copy(self, cache):
        return World(cache, list(self.rows), self.real.copy(), self.recorded, self.longest)


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
    """Attention of the last rows of one sequence by the words of the definition: float64 `[heads, tokens, dim]`.

    What is kept of keys is kept less their centre, `[kv_heads, dim]`, and they are whole again here.
    """
    heads, tokens, _ = query.shape
    n, group = key.shape[1], heads // plan.model.kv_heads
    out = torch.zeros(heads, tokens, DIM, dtype=torch.float64)
    i, j = np.arange(n - tokens, n)[:, None], np.arange(n)[None]
    native = plan.model.native_windows[layer]
    for head in range(heads):
        each = plan.rules[layer][head // group]
        w = np.minimum(i + 1, np.maximum(plan.min_window, each.alpha + each.beta_q * (i + 1) // 1024))
        seen = (j <= i) & ((j < each.sink) | (j > i - w))
        if native is not None:
            seen &= j > i - native
        if each.selects:
            entered, gone, left = selected(each, plan.min_window, scored[head // group].tolist())
            seen |= (j <= i) & (entered[j] <= left[i]) & (left[i] < gone[j])
        k, v = key[head // group], kept(value[head // group], each.value_format)
        if centre is not None:
            wide, c = torch.promote_types(k.dtype, torch.float32), torch.from_numpy(centre[head // group])
            k = kept((k.to(wide) - c).to(k.dtype), each.key_format) + c
        else:
            k = kept(k, each.key_format)
        scores = query[head].double() @ k.T * DIM**-0.5
        weights = scores.masked_fill(~torch.from_numpy(seen), -torch.inf).softmax(-1)
        out[head] = weights @ v
    return out


def kept(x, name):
    """What is attended to of keys or values, `[tokens, dim]`, in a format: float64."""
    return (round_to(x, FORMATS[name].bits) if FORMATS[name].bits else x).double()


class Attention:
    """Layers that are attention alone, of random queries, keys, values and scores.

    A world's row has of every layer keys and values `[kv_heads, tokens, dim]` and scores `[kv_heads, tokens]`. Keys lie less
    `centres[layer]` in the cache, those of native formats too, where that changes nothing.
    """

    def __init__(self, plan, dtype, generator, centres=None):
        self.plan, self.dtype, self.generator, self.centres = plan, dtype, generator, centres
        empty = torch.zeros(plan.model.kv_heads, 0, DIM, dtype=dtype)
        self.empty = [empty, empty, torch.zeros(plan.model.kv_heads, 0, dtype=torch.int16)] * plan.model.layers

    def centre(self, layer):
        return None if self.centres is None else self.centres[layer]

    def feed(self, world, real, same=False):
        """Feeds columns one by one or as a chunk, and checks every output of a real token; `same`: of equal rows.

        Args:
            world: where to.
            real: which tokens are, bool `[rows, columns]`.
            same: whether all rows are fed what the first is.
        """
        plan, shape, (batch, tokens) = self.plan, self.plan.model, real.shape
        mask = torch.from_numpy(np.concatenate([world.real, real], axis=1))
        world.cache.real = read_mask(None if mask.all() else mask, world.cache, batch, tokens)
        chunk_mask = None if real.all() else torch.from_numpy(real)
        shared_keys, chunks = AnchorKeys(with_gradients=False), {}
        rows = [[] for _ in world.rows]
        for layer in range(shape.layers):
            query, key, value, scored = self.draw(layer, batch, tokens, same)
            world.cache.update(key, value, layer)
            share = plan.share(layer)
            context = LayerContext.of(
                layer,
                plan.rules[layer],
                plan.min_window,
                shape.native_windows[layer],
                share,
                bool(reuse_layers_of(plan.shares, layer)),
                None if share is not None else self.centre(layer),
            )
            gate_scores = scored if context.selects else None
            call = {CONTEXT: LayerCall(context, world.cache, gate_scores), SHARED_KEYS: shared_keys}
            with kernels_for(tokens):
                found, _ = attention_forward(MODULE, query, key, value, chunk_mask, **call)
            found = found.transpose(1, 2)
            chunks[layer], centre = (query, key), self.centre(layer)
            if share is not None:
                its_query, its_key = chunks[share.anchor]
                key, heads = its_key[:, list(share.head_map)], list(share.head_map)
                centre = None if centre is None else self.centre(share.anchor)[heads]
                by_head = its_query.unflatten(1, (shape.kv_heads, -1))
                query = by_head[:, heads].flatten(1, 2)
            for row in range(batch):
                at = np.flatnonzero(real[row])
                before = world.rows[row][3 * layer : 3 * layer + 3]
                k, v, s = (
                    torch.cat((old, new[row][:, at]), 1) for old, new in zip(before, (key, value, scored), strict=True)
                )
                rows[row] += k, v, s

                def check(found, query, tokens=(k, v, s), layer=layer, centre=centre):
                    wanted = expected(plan, layer, query, *tokens, centre) if tokens[0].shape[1] else 0.0
                    assert (found - wanted).abs().max() < TOLERANCE[self.dtype]

                if len(at):
                    check(found[row][:, at], query[row][:, at])
                assert not found[row][:, :-1][:, ~real[row, :-1]].any()
                if not real[row, -1]:  # generate continues from the last column: it sees what the last real token sees
                    check(found[row][:, -1:], query[row][:, -1:])
        world.rows = rows
        world.count(real)

    def step(self, world, real):
        """Feeds columns one after the other."""
        for column in range(real.shape[1]):
            self.feed(world, real[:, column : column + 1])

    def draw(self, layer, batch, tokens, same):
        """Returns queries, keys, values and scores of a chunk."""
        shape, generator = self.plan.model, self.generator
        query, key, value = (
            torch.randn(batch, heads, tokens, DIM, generator=generator, dtype=torch.float64).to(self.dtype)
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        )
        few = 4 if layer else 30000  # ties in one layer
        scored = torch.randint(-few, few, key.shape[:3], generator=generator).to(torch.int16)
        if same:
            key, value, scored = (tensor[:1].expand_as(tensor).contiguous() for tensor in (key, value, scored))
        return query, key, value, scored


class Decoder:
    """A whole model: a world's row is the ids of its tokens, `[1, tokens]`.

    Args:
        model: under the plan.
        generator: draws ids.
        tolerance: of logits, as a share of the largest.
    """

    def __init__(self, model, generator, tolerance):
        self.model, self.generator, self.tolerance = model, generator, tolerance
        self.plan = model._moacompress.plan
        self.empty = [torch.zeros(1, 0, dtype=torch.int64)]

    def feed(self, world, real, same=False):
        """See `Attention.feed`."""
        ids = self.draw(real, same)
        self.check(world, real, ids, self.logits(world, real, ids))

    def step(self, world, real):
        """See `Attention.step`."""
        ids = self.draw(real)
        columns, found = real.shape[1], []
        for end in range(1, columns + 1):
            found.append(self.logits(world, real[:, :end], ids[:, end - 1 : end]))
        self.check(world, real, ids, torch.cat(found, 1))

    def draw(self, real, same=False):
        ids = torch.randint(3, self.model.config.vocab_size, real.shape, generator=self.generator)
        return ids[:1].expand_as(ids).contiguous() if same else ids

    def logits(self, world, real, ids):
        """Returns logits of the last columns of `real`, which are fed after the world's."""
        whole = np.concatenate([world.real, real], axis=1)
        positions = torch.from_numpy(np.maximum(whole.cumsum(1) - 1, 0)[:, -ids.shape[1] :])
        mask = None if whole.all() else torch.from_numpy(whole).long()
        with torch.no_grad(), kernels_for(ids.shape[1]):
            return self.model(ids, attention_mask=mask, position_ids=positions, cache=world.cache).logits

    def check(self, world, real, ids, found):
        """Compares logits of real tokens, `[rows, columns, vocabulary]`, with rows read alone."""
        for row, (before,) in enumerate(world.rows):
            at = np.flatnonzero(real[row])
            world.rows[row] = [torch.cat((before, ids[row : row + 1, at]), 1)]
            if not len(at):
                continue
            with torch.no_grad(), plain_kernels():
                wanted = self.model(*world.rows[row], use_cache=False).logits[0, -len(at) :]
            error = (found[row, at] - wanted).abs().max() / wanted.abs().max()
            assert error < self.tolerance
        world.count(real)


@contextmanager
def plain_kernels():
    """Has attention run in plain PyTorch."""
    with patch.dict(os.environ, {dispatch.VARIABLE: "reference"}):
        dispatch.forget()
        yield
    dispatch.forget()


def kernels_for(tokens):
    """Has chunks run in plain PyTorch where that is quicker than the interpreter of Triton's kernels."""
    return plain_kernels() if tokens > 1 and os.environ.get(dispatch.VARIABLE) == "triton" else nullcontext()


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
            numbers = np.arange(ids.shape[2])
            in_runs = [
                (begin[..., None] <= numbers) & (numbers < end[..., None]) for begin, end in cache_layer.held.runs
            ]
            assert (np.any(in_runs, axis=0) == (ids >= 0)).all()
            for row, (n, longest) in enumerate(zip(world.lengths, world.longest, strict=True)):
                selects = any(each.selects for each in plan.rules[layer])
                lag = LAG * (1 + selects)
                first = min(n, max(longest - lag, 0)) if world.recorded else n
                for head, each in enumerate(plan.rules[layer]):
                    wanted = touched(each, plan.min_window, native, np.arange(first, n + 1), ids.shape[2]).any(axis=0)
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


WHICH = st.integers(0, 2)
CHUNK = st.one_of(st.integers(1, 110), st.integers(LAG, 2 * LAG))


class CacheMachine(RuleBasedStateMachine):
    """Operations on a cache and its copies: what is attended to is right, and so are the blocks that are held.

    Attributes:
        backend: whose kernels run.
        most_steps: in a row; a step in the interpreter of Triton's kernels takes a second.
    """

    backend = ""
    most_steps = 20

    def subject_of(self, data, generator):
        """Returns what feeds caches: an `Attention` or a `Decoder`."""
        raise NotImplementedError

    @initialize(data=st.data(), seed=st.integers(0, 2**31), batch=st.integers(1, 3), recorded=st.booleans())
    def begin(self, data, seed, batch, recorded):
        self.subject = self.subject_of(data, torch.Generator().manual_seed(seed))
        cache = PlanCache(self.subject.plan, reserve=data.draw(st.sampled_from([None, 40, 200])))
        if recorded:
            cache.activate_past_recording()
        self.worlds = [World.begin(cache, self.subject.empty, batch, recorded)]
        self.chunk(0, data.draw(CHUNK), data.draw(st.booleans()))

    def world(self, which):
        return self.worlds[which % len(self.worlds)]

    @rule(which=WHICH, tokens=CHUNK, same=st.booleans())
    def chunk(self, which, tokens, same):
        world = self.world(which)
        self.subject.feed(world, np.ones((len(world.rows), tokens), bool), same)

    @rule(which=WHICH, count=st.integers(1, 20))
    def step(self, which, count):
        world = self.world(which)
        self.subject.step(world, np.ones((len(world.rows), min(count, self.most_steps)), bool))

    @rule(which=WHICH, tokens=st.integers(2, 20), accepted=st.integers(0, 20))
    def draft(self, which, tokens, accepted):
        world = self.world(which)
        self.subject.feed(world, np.ones((len(world.rows), tokens), bool))
        world.crop(max(tokens - accepted, 0))

    @rule(
        which=WHICH,
        tokens=st.integers(1, 40),
        kind=st.sampled_from(["left", "right", "holes"]),
        singly=st.booleans(),
        data=st.data(),
    )
    def pad(self, which, tokens, kind, singly, data):
        world = self.world(which)
        real = np.ones((len(world.rows), tokens), bool)
        for row in real:
            if kind == "holes":
                row[:] = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
            else:
                pads = data.draw(st.integers(0, tokens))
                row[slice(0, pads) if kind == "left" else slice(tokens - pads, tokens)] = False
        if singly:
            self.subject.step(world, real[:, -self.most_steps :])
        else:
            self.subject.feed(world, real)

    @rule(which=WHICH, size=st.integers(1, 3), beams=st.booleans(), data=st.data())
    def select(self, which, size, beams, data):
        world = self.world(which)
        rows = len(world.rows)
        size = rows if beams else min(size, rows)
        picks = data.draw(st.lists(st.integers(0, rows - 1), min_size=size, max_size=size))
        (world.cache.reorder_cache if beams else world.cache.batch_select_indices)(torch.tensor(picks))
        world.select(picks)

    @rule(which=WHICH)
    def repeat(self, which):
        world = self.world(which)
        if len(world.rows) <= 2:
            world.cache.batch_repeat_interleave(2)
            world.select(np.arange(len(world.rows)).repeat(2).tolist())

    @rule(which=WHICH, count=st.integers(0, 150))
    def crop(self, which, count):
        world = self.world(which)
        world.crop(min(count, world.real.shape[1]))

    @rule(which=WHICH, kind=st.sampled_from(["fork", "compact", "pickle"]))
    def copy(self, which, kind):
        cache = self.world(which).cache
        if len(self.worlds) < 3:
            copied = pickle.loads(pickle.dumps(cache)) if kind == "pickle" else getattr(cache, kind)()
            self.worlds.append(self.world(which).copy(copied))

    @rule(which=WHICH, tokens=st.integers(1, 60), batch=st.integers(1, 2))
    def join(self, which, tokens, batch):
        world = self.world(which)
        if world.recorded or len(world.rows) + batch > 4:
            return
        other = World.begin(world.cache.beside(), self.subject.empty, batch, False)
        self.subject.feed(other, np.ones((batch, tokens), bool))
        world.cache.join(other.cache)
        world.join(other)

    @rule(which=WHICH)
    def record(self, which):
        world = self.world(which)
        if not world.real.shape[1]:
            world.cache.activate_past_recording()
            world.recorded = True

    @invariant()
    def blocks_are_held(self):
        for world in self.worlds:
            assert world.cache.get_seq_length() == world.real.shape[1]
        check_blocks(self.subject.plan, self.worlds)


class AttentionMachine(CacheMachine):
    def subject_of(self, data, generator):
        plan = data.draw(plans())
        norm, shape = data.draw(st.sampled_from([0, 1, 100])), plan.model
        drawn = np.random.default_rng(norm).standard_normal((shape.layers, shape.kv_heads, DIM)).astype(np.float32)
        centres = norm * drawn / np.linalg.norm(drawn, axis=-1, keepdims=True) if norm else None
        return Attention(plan, data.draw(st.sampled_from(DTYPES[self.backend])), generator, centres)


class DecoderMachine(CacheMachine):
    """Steps go by one route at most as fast as a given one.

    Attributes:
        route: its name.
        make: makes a tiny dense model of a family.
        taken: how many layers of steps went by each route.
    """

    route = ""
    make = None
    taken: Counter[str]

    def subject_of(self, data, generator):
        names = [route.name for route in routes.ROUTES]
        self.patched = patch.object(routes, "ROUTES", routes.ROUTES[names.index(self.route) :])
        self.patched.start()
        dtype = data.draw(st.sampled_from([dtype for dtype in DTYPES[self.backend] if dtype != torch.float64]))
        model = type(self).make(data.draw(st.sampled_from(["llama", "mistral"]))).to(dtype)
        shape, kind = model_shape(model), data.draw(st.sampled_from([*KINDS, "gates", "shares"]))
        if kind == "gates" and dtype != torch.float32:  # whose scores are other ones by each route
            kind = "native"
        rules = data.draw(rules_of(shape, kind if kind in KINDS else "native"))
        plan = Plan(shape, data.draw(st.sampled_from(MIN_WINDOWS)), tuple(rules))
        if kind == "gates":
            rules = data.draw(selecting(shape, rules))
            drawn = np.random.default_rng(0)
            gates = GateWeights(
                drawn.standard_normal((shape.layers, shape.kv_heads, model.config.hidden_size)).astype(np.float32),
                drawn.standard_normal((shape.layers, shape.kv_heads)).astype(np.float32),
            )
            plan = replace(plan, rules=tuple(rules), gates=gates.fingerprint, gate_weights=gates)
        elif kind == "shares":
            shares = (*[None] * (shape.layers - 1), Share(shape.layers - 2, tuple(reversed(range(shape.kv_heads)))))
            plan = replace(plan, rules=with_shared_rules(rules, shares), shares=shares)
        elif kind != "native":
            plan = replace(plan, centres=random_centres(shape, 1.0))
        return Decoder(attach(model, plan), generator, LOGIT_TOLERANCE[dtype][kind])

    def teardown(self):
        for world in self.worlds:
            self.taken.update(world.cache.step_routes)
        self.patched.stop()


def run(machine, examples, **attributes):
    """Runs a machine through examples, of other operations each; the same ones again, unless the environment gives a number."""
    run_state_machine_as_test(
        type(machine.__name__, (machine,), attributes),
        settings=settings(
            max_examples=int(GIVEN or examples),
            stateful_step_count=10,
            deadline=None,
            derandomize=GIVEN is None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize(
    ("backend", "examples"),
    [
        ("reference", 10),
        ("cpu", 25),
        ("triton", 1),
        pytest.param("reference", 300, marks=pytest.mark.heavy),
        pytest.param("cpu", 500, marks=pytest.mark.heavy),
        pytest.param("triton", 20, marks=pytest.mark.heavy),
    ],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_attention_of_any_operations(backend, examples, use_backend):
    use_backend(backend)
    run(AttentionMachine, examples, backend=backend, most_steps=2 if backend == "triton" else 20)


ROUTES = [
    *[("cpu", route, 4, 100) for route in ("all layers", "one layer", "cache step", "plain")],
    ("reference", "cache step", 2, 50),
    ("triton", "ring step", 0, 10),
]
"""Backend, route, and how many examples there are in `make test` and in `make test-all`."""


@pytest.mark.parametrize(
    ("backend", "route", "examples"),
    [
        *[(backend, route, few) for backend, route, few, _ in ROUTES if few],
        *[pytest.param(backend, route, many, marks=pytest.mark.heavy) for backend, route, _, many in ROUTES],
    ],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_logits_by_every_route(backend, route, examples, use_backend, tiny_model):
    use_backend(backend)
    taken = Counter()
    attributes = {"make": staticmethod(tiny_model), "route": route, "taken": taken}
    run(DecoderMachine, examples, backend=backend, most_steps=2 if backend == "triton" else 20, **attributes)
    assert taken[route] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sinks_outlast_a_roll_back(dtype):
    """A native window has evicted them when a roll back ends, and a second one may go back to where they were still visible."""
    shape = ModelShape("llama", 1, 2, 2, DIM, "float64", (70,), "")
    plan = Plan(shape, 16, ((Rule.FULL, Rule(4, 0, 0)),))
    cache, attention = PlanCache(plan), Attention(plan, dtype, torch.Generator().manual_seed(0))
    cache.activate_past_recording()
    world = World.begin(cache, attention.empty, 1, True)
    attention.feed(world, np.ones((1, 160), bool))
    world.crop(76)
    for _ in range(3):
        attention.step(world, np.ones((1, 1), bool))
        check_blocks(plan, [world])
    world.crop(27)
    assert world.lengths == [60]
    attention.step(world, np.ones((1, 1), bool))
