"""Caches beside all that was ever fed to them, what feeds them, and what they must hold and give: for `test_property.py`."""

from __future__ import annotations

import heapq
import os
import types
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch

from moacompress.core.errors import UnsupportedError
from moacompress.kernels import dispatch
from moacompress.kernels.reference.rounding import round_to
from moacompress.rules.formats import FORMATS
from moacompress.rules.share import reuse_layers_of
from moacompress.runtime.cache.block_runs import LAG
from moacompress.runtime.cache.plan_cache import PlanCache
from moacompress.runtime.decode.attention import attention_forward
from moacompress.runtime.decode.context import CONTEXT, LayerCall, LayerContext
from moacompress.runtime.hf.hooks import read_mask
from moacompress.runtime.sharing.shared_keys import SHARED_KEYS, AnchorKeys
from tests import oracle

DIM = 8


MODULE = types.SimpleNamespace(is_causal=True)


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Of attention, absolute."""


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
    """Number of evicted tokens when a gate begins to keep each token, and when it ends; and at each query.

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
    """Attention of the last rows of one sequence by `oracle`, with masks that are quicker: float64 `[heads, tokens, dim]`.

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
        if centre is None:
            k = kept(k, each.key_format)
        else:
            wide, c = torch.promote_types(k.dtype, torch.float32), torch.from_numpy(centre[head // group])
            k = kept((k.to(wide) - c).to(k.dtype), each.key_format) + c
        out[head] = oracle.attend_head(query[head : head + 1], k, v, torch.from_numpy(seen))[0][0]
    return out


def kept(x, name):
    """What is attended to of keys or values, `[tokens, dim]`, in a format: float64; `oracle.kept` has the dtype of `x`."""
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
    anchors = []
    for world in worlds:
        for layer, cache_layer in enumerate(world.cache.layers):
            assert (cache_layer.lengths == world.lengths).all()
            if plan.share(layer) is not None:  # its values lie in its anchor's blocks
                continue
            anchors.append(cache_layer.held)
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
    for pool in {id(held.pool): held.pool for held in anchors}.values():
        own = [held for held in anchors if held.pool is pool]
        tables = [table for held in own for table in (*held.tables, *(each.selected for each in held.past))]
        named = np.concatenate([table.ids.reshape(-1) for table in tables])
        counts = np.bincount(named[named >= 0], minlength=len(pool.refs))
        assert (np.minimum(counts, 1) == np.minimum(pool.refs, 1)).all()
        assert not pool.shared or (counts == pool.refs).all()
