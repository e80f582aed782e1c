"""A whole decoder layer in one call: equal to PyTorch in float64, and the same to the bit whatever else is computed beside."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from moacompress.kernels import cpu_ops, dispatch
from moacompress.kernels.block_reference import reference_decode
from moacompress.rules.rule import Rule
from moacompress.runtime import fused
from moacompress.runtime.layer import PlanCacheLayer
from moacompress.runtime.real_tokens import Chunk

TOLERANCE = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}


@pytest.fixture(autouse=True)
def _built(isa):
    """Skips where the kernels cannot run, and leaves the best instruction set behind."""


@dataclass
class Case:
    """A random decoder layer and a cache with some tokens of every row."""

    cache: PlanCacheLayer
    x: torch.Tensor
    weights: list[torch.Tensor]
    biases: list[torch.Tensor]
    norms: list[torch.Tensor]
    rotary: tuple[torch.Tensor, torch.Tensor]
    scores: tuple[float, float, torch.Tensor | None]
    eps: float = 1e-3

    def arguments(self, **changes: Any) -> tuple[Any, ...]:
        """What the operator takes, in its order; `changes` by name."""
        cache = self.cache
        assert cache._pool is not None
        state = (cache._table.ids, cache.lengths, cache._runs.ends, cache._pool.refs)
        names = ("x", "weights", "biases", "norms", "eps", "cos", "sin", "keys", "values")
        layer = (self.x, self.weights, self.biases, self.norms, self.eps, *self.rotary)
        found = dict(zip(names, (*layer, cache._pool.keys, cache._pool.values), strict=True)) | changes
        rest = (*map(torch.from_numpy, state), *cache._rule.columns, 0, *self.scores)
        return (*found.values(), *rest)

    def step(self) -> torch.Tensor:
        """Makes the call until there is room for the token."""
        layer = (self.weights, self.biases, self.norms, self.eps, *self.rotary)

        def kernel(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, int]:
            return torch.ops.moacompress_cpu.step_layer(x, *layer, *rest)

        found = self.cache.step_from(kernel, self.x, scores=self.scores)
        assert found is not None
        return found

    def expected(self) -> torch.Tensor:
        """The same in float64, once the token is in the cache."""
        cache, rows = self.cache, self.x.shape[0]
        assert cache._pool is not None
        keys, values, table = cache.blocks_of_rows()
        x, cos, sin = self.x.double(), *(part.double() for part in self.rotary)
        output, gate, up, last = (weight.double() for weight in self.weights[3:])
        normed = normalized(x, self.norms[0].double(), self.eps)
        bias = self.biases[0].double() if self.biases else None
        query = linear(normed, self.weights[0].double(), bias).view(rows, 1, -1, cos.shape[-1]).transpose(1, 2)
        pool = (
            [part.double() for part in keys],
            [part.double() for part in values],
            table,
            torch.from_numpy(cache.lengths),
        )
        rules: tuple[Any, ...] = (*cache._rule.columns, *self.scores)
        mixed, _ = reference_decode(fused.rotated(query, cos, sin)[:, :, 0], *pool, *rules)
        hidden = x + linear(mixed.reshape(rows, 1, -1), output)
        normed = normalized(hidden, self.norms[1].double(), self.eps)
        gated = torch.nn.functional.silu(linear(normed, gate)) * linear(normed, up)
        return hidden + linear(gated, last)


def normalized(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def build(seed: int, dtype: torch.dtype, rows: int | None = None) -> Case:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows, heads, group = rows or rng.randint(1, 9), rng.randint(1, 3), rng.randint(1, 3)
    dim, value_dim, hidden, inner = (
        rng.choice((2, 6, 16, 34)),
        rng.choice((1, 5, 16)),
        rng.randint(1, 70),
        rng.randint(1, 150),
    )
    rules = [
        Rule(rng.choice((4, 16, 64)), rng.choice((0, 7, 40, 128)), rng.choice((0, 100, 700, 1024)))
        for _ in range(heads)
    ]
    cache = PlanCacheLayer(rules, rng.choice((16, 48)), rng.choice((None, None, 9, 60)))
    tokens = rng.choice((1, 20, 150))
    cache.update(torch.randn(rows, heads, tokens, dim).to(dtype), torch.randn(rows, heads, tokens, value_dim).to(dtype))
    cache.commit(Chunk.of(None, tokens))
    outputs = [heads * group * dim, heads * dim, heads * value_dim]
    shapes = [*((n, hidden) for n in outputs), (hidden, heads * group * value_dim)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    weights = [(torch.randn(shape) / shape[1] ** 0.5).to(dtype) for shape in shapes]
    biases = [torch.randn(n).to(dtype) for n in outputs] if rng.random() < 0.5 else []
    norms = [torch.rand(hidden).to(dtype) + 0.5 for _ in range(2)]
    angles = torch.randn(rng.choice((1, rows)), 1, dim)
    rotary = (angles.cos().to(dtype), angles.sin().to(dtype))
    scores = (rng.choice((0.2, 1.0)), rng.choice((0.0, 3.0)), rng.choice((None, torch.randn(heads * group))))
    return Case(cache, torch.randn(rows, 1, hidden).to(dtype), weights, biases, norms, rotary, scores)


@pytest.mark.parametrize("seed", range(300))
def test_random_layers(seed, isa, poisoned_memory):
    isa(cpu_ops.ISAS[seed % 4])
    dtype = cpu_ops.DTYPES[seed // 4 % 3]
    case = build(seed, dtype)
    for _ in range(2):
        found, expected = case.step(), case.expected()
        assert found.dtype == dtype
        assert found.shape == expected.shape
        assert bool(((found.double() - expected).abs() <= TOLERANCE[dtype] * (1 + expected.abs().max())).all())


@pytest.mark.parametrize("name", cpu_ops.ISAS)
@pytest.mark.parametrize("dtype", cpu_ops.DTYPES)
def test_threads_and_other_rows_change_no_bit(name, dtype, isa, threads):
    isa(name)
    case = build(5, dtype, rows=4)
    case.rotary = tuple(part[:1] for part in case.rotary)
    results = []
    for count in (1, 2, 17):
        threads(count)
        results.append(build(5, dtype, rows=4))
        results[-1].rotary = case.rotary
        results[-1] = results[-1].step()
    assert all(torch.equal(results[0], other) for other in results[1:])
    for row in range(4):
        alone = build(5, dtype, rows=4)
        alone.cache.select(np.array([row]))
        alone.x, alone.rotary = alone.x[row : row + 1], case.rotary
        assert torch.equal(alone.step(), results[0][row : row + 1])


@pytest.mark.parametrize("name", cpu_ops.ISAS)
@pytest.mark.parametrize("dtype", cpu_ops.DTYPES)
def test_nan_goes_through_and_spoils_no_other_row(name, dtype, isa):
    """The row that has it, and what that row makes of its cache later on: by a whole layer, by its attention and by layers."""
    isa(name)
    for seed in (5, 6, 7):
        results = []
        for number in (float("nan"), 0.5):
            case = build(seed, dtype, rows=4)
            case.scores = (case.scores[0], 0.0, None)
            case.x[2, 0, 0] = number
            first = case.step()
            case.x = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            layer = (case.weights[:3], case.biases, *case.rotary)
            attention = case.cache.step_from(
                lambda x, *rest, layer=layer: torch.ops.moacompress_cpu.step_hidden(x, *layer, *rest),
                case.x,
                scores=case.scores,
            )
            assert attention is not None
            assert case.cache._pool is not None
            case.cache._pool.grow(100)
            case.cache._table.widen(20)
            layers, caches = read(case)
            both = dispatch.step_layers(case.x, case.rotary, caches, 0)
            assert both[1:] == (2, 0)
            results.append((first, attention, both[0]))
            cpu_ops.forget_caches(caches)
            cpu_ops.forget_layers(layers)
        others = torch.tensor([0, 1, 3])
        for mine, clean in zip(*results, strict=True):
            assert mine[2].isnan().all()
            assert not clean.isnan().any()
            assert torch.equal(mine[others], clean[others])


def test_bad_arguments_are_refused():
    case = build(8, torch.float32, rows=2)
    case.biases = []
    before = [array.copy() for array in (case.cache._table.ids, case.cache.lengths, case.cache._runs.ends)]

    def refused(match, **changes):
        with pytest.raises(RuntimeError, match=match):
            torch.ops.moacompress_cpu.step_layer(*case.arguments(**changes))
        after = (case.cache._table.ids, case.cache.lengths, case.cache._runs.ends)
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))

    def weights(at, change):
        return [change(w).contiguous() if i == at else w for i, w in enumerate(case.weights)]

    hidden = case.x.shape[2]
    refused("6 weights, 0 biases and 2 norms", weights=case.weights[:6])
    refused("7 weights, 0 biases and 1 norms", norms=case.norms[:1])
    refused("eps is -1", eps=-1.0)
    refused("a norm has the shape", norms=[case.norms[0], case.norms[1][1:]])
    refused("a norm has another dtype", norms=[case.norms[0].half(), case.norms[1]])
    refused("input has the shape", x=torch.randn(2, 2, hidden))
    refused("weight 1 has", weights=weights(1, lambda w: w.repeat(2, 1)))
    refused("weight has the shape", weights=weights(3, lambda w: w.repeat(1, 2)))
    for at in (3, 4, 5, 6):
        refused(
            "outputs; the first and last must be|weight has the shape", weights=weights(at, lambda w: w.repeat(2, 1))
        )
        refused("weight has another dtype", weights=weights(at, torch.Tensor.half))
    strided = torch.randn(hidden, 2 * case.weights[6].shape[1])[:, ::2]
    refused("weight must be contiguous", weights=[*case.weights[:6], strided])
    assert torch.ops.moacompress_cpu.step_layer(*case.arguments())[1] in (0, 1)


def read(case: Case) -> tuple[int, int]:
    """Reads a case's layer, twice over as if there were two, and its cache; returns their numbers."""
    sink, alpha, beta_q, min_window, native = case.cache._rule.columns
    columns = [sink, alpha, beta_q]
    rules: tuple[Any, ...] = (columns * 2, min_window, [native] * 2, case.scores[0])
    weights = (case.weights * 2, case.biases * 2, case.norms * 2, case.eps, case.rotary[0].shape[-1])
    layers = dispatch.read_layers(*weights, *rules)
    return layers, dispatch.read_caches(layers, [case.cache.state()] * 2, 0)


def plain(seed: int, dtype: torch.dtype, rows: int) -> Case:
    """A case without softcap and learned logits, with room for some tokens."""
    case = build(seed, dtype, rows)
    case.scores = (case.scores[0], 0.0, None)
    case.step()
    assert case.cache._pool is not None
    case.cache._pool.grow(100)
    case.cache._table.widen(20)
    return case


@pytest.mark.parametrize("seed", range(30))
def test_layers_one_after_the_other(seed):
    """Both of them have the same weights and, to make it simple, the same cache."""
    dtype = cpu_ops.DTYPES[seed % 3]
    case, other = plain(seed, dtype, 2), plain(seed, dtype, 2)
    layers, caches = read(case)
    found = dispatch.step_layers(case.x, case.rotary, caches, 0)
    assert found[1:] == (2, 0)
    other.x = other.step()
    assert torch.equal(other.step(), found[0])
    again = dispatch.step_layers(other.x, case.rotary, caches, 1)
    assert again[1:] == (2, 0)
    assert torch.equal(other.step(), again[0])
    cpu_ops.forget_caches(caches)
    cpu_ops.forget_layers(layers)


def test_weights_that_were_moved_are_seen():
    case = plain(8, torch.float32, 2)
    layers, caches = read(case)
    assert dispatch.step_layers(case.x, case.rotary, caches, 0)[1:] == (2, 0)
    lengths = case.cache.lengths.copy()
    case.weights[4].data = case.weights[4].data.clone()
    assert dispatch.step_layers(case.x, case.rotary, caches, 0)[1:] == (0, -1)
    assert np.array_equal(lengths, case.cache.lengths)
    cpu_ops.forget_layers(layers)
    cpu_ops.forget_caches(caches)


def test_what_is_read_is_checked():
    case = plain(8, torch.float32, 2)
    case.biases = []
    sink, alpha, beta_q, min_window, native = case.cache._rule.columns
    good = {
        "weights": case.weights,
        "biases": [],
        "norms": case.norms,
        "eps": case.eps,
        "head_dim": case.rotary[0].shape[-1],
        "columns": [sink, alpha, beta_q],
        "min_window": min_window,
        "native_windows": [native],
        "scaling": 0.5,
    }

    def refused(match, **changes):
        with pytest.raises(RuntimeError, match=match):
            dispatch.read_layers(**(good | changes))

    refused("6 weights, 0 biases, 2 norms and 3 columns of rules for 1 layers", weights=case.weights[:6])
    refused("for 0 layers", native_windows=[])
    refused("for 2 layers", native_windows=[0, 0])
    refused("weight has another dtype", weights=[case.weights[0], case.weights[1].half(), *case.weights[2:]])
    refused("a norm has the shape", norms=[case.norms[0][1:], case.norms[1]])
    refused("eps is -1", eps=-1.0)
    refused("KV heads of 0", head_dim=0)
    refused("has .* outputs, for", head_dim=case.rotary[0].shape[-1] + 1)
    refused("sink has the shape", columns=[sink[None], alpha, beta_q])
    refused("alpha has the shape", columns=[sink, torch.cat((alpha, alpha)), beta_q])
    refused("scaling is 0", scaling=0.0)
    layers, state = dispatch.read_layers(**good), case.cache.state()

    def cache_refused(match, states=(state,), lag=0):
        with pytest.raises(RuntimeError, match=match):
            dispatch.read_caches(layers, states, lag)

    cache_refused("2 numbers of segments and 8 parts of caches for 1 layers", [state, state])
    cache_refused("0 segments of layer 0", [state._replace(keys=[], values=[])])
    cache_refused("segments of layer 0, of .* of keys and 0 of values", [state._replace(values=[])])
    cache_refused("lengths has another dtype", [state._replace(lengths=state.lengths.int())])
    cache_refused("refs counts", [state._replace(refs=state.refs[:-1].clone())])
    cache_refused("lag is -1", lag=-1)
    with pytest.raises(RuntimeError, match="no layers of the number 0"):
        dispatch.read_caches(0, [state], 0)
    caches = dispatch.read_caches(layers, [state], 0)
    for x, match in (
        (case.x[:1], "input has the shape"),
        (case.x.half(), "another dtype"),
        (case.x[:, 0], "the shape"),
    ):
        with pytest.raises(RuntimeError, match=match):
            dispatch.step_layers(x, case.rotary, caches, 0)
    with pytest.raises(RuntimeError, match="first layer is 1 of 1"):
        dispatch.step_layers(case.x, case.rotary, caches, 1)
    with pytest.raises(RuntimeError, match="cos has the shape"):
        dispatch.step_layers(case.x, (case.rotary[0][..., 1:], case.rotary[1]), caches, 0)
    with pytest.raises(RuntimeError, match="layer 1 of 1"):
        dispatch.read_cache(caches, 1, state, 0)
    cpu_ops.forget_caches(caches)
    cpu_ops.forget_caches(caches)
    with pytest.raises(RuntimeError, match="no caches of the number"):
        dispatch.step_layers(case.x, case.rotary, caches, 0)
    cpu_ops.forget_layers(layers)


def test_fakes_have_the_shapes_of_the_real_ones():
    case = build(11, torch.float32, rows=2)
    assert case.step() is not None  # there is room for another token
    arguments = case.arguments()
    layer, state = arguments[:7], arguments[7:]
    heads, dim, value_dim = len(case.cache.rules), layer[5].shape[-1], state[1][0].shape[-1]
    token = tuple(torch.randn(2, n, 1, d) for n, d in ((heads * 2, dim), (heads, dim), (heads, value_dim)))
    unscored = (*state[:-1], None)
    calls = {
        "step": (*token, *unscored),
        "step_hidden": (layer[0], layer[1][:3], layer[2], *layer[5:], *state),
        "step_layer": arguments,
    }
    for name, given in calls.items():
        operator = getattr(torch.ops.moacompress_cpu, name).default
        torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))
