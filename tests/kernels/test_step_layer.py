"""A whole decoder layer in one call: equal to PyTorch in float64, and the same to the bit whatever else is computed beside."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from moacompress.kernels.arguments import (
    CacheState,
    CacheView,
    LayerWeights,
    NormAndMlpWeights,
    Projections,
    Rotary,
    Scores,
    as_tensors,
)
from moacompress.kernels.bound import BoundCaches, WeightsMoved
from moacompress.kernels.cpu import library
from moacompress.kernels.cpu.cpu_backend import CpuBackend
from moacompress.kernels.dispatch import REFERENCE
from moacompress.kernels.weight_blocks import NATIVE, WEIGHT_TYPES, dequantized
from moacompress.rules.formats import FORMATS
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import COLUMNS, RuleTable
from moacompress.runtime.cache.layer_cache import PlanCacheLayer
from moacompress.runtime.cache.real_tokens import Chunk
from moacompress.runtime.decode.step_requests import rotated

pytestmark = pytest.mark.usefixtures("isa")
"""Skips where the kernels cannot run, and leaves the best instruction set behind."""

CPU = CpuBackend()

TOLERANCE = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}


@dataclass
class Case:
    """A random decoder layer and a cache with some tokens of every row."""

    cache: PlanCacheLayer
    x: torch.Tensor
    weights: list[torch.Tensor]
    biases: list[torch.Tensor]
    norms: list[torch.Tensor]
    rotary: Rotary
    scores: Scores
    eps: float = 1e-3
    blocks: list[torch.Tensor] | None = None
    """What is given in the place of the weights, which are then what these stand for."""
    kinds: Sequence[int] = ()

    @property
    def given(self) -> list[torch.Tensor]:
        return self.weights if self.blocks is None else self.blocks

    @property
    def rules(self) -> RuleTable:
        return as_tensors(self.cache.rules)

    @property
    def layer(self) -> LayerWeights:
        norms_and_mlp = NormAndMlpWeights(self.norms, self.eps, self.given[3:], self.kinds[3:])
        return LayerWeights(Projections(self.given[:3], self.biases, self.kinds[:3]), norms_and_mlp)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        held = self.cache.blocks_held()
        return held.table.ids, held.lengths, held.runs

    def state(self) -> CacheState:
        return self.cache.blocks_held().state(0)

    def arguments(self, **changes: Any) -> tuple[Any, ...]:
        """What the operator takes, in its order; `changes` by name."""
        keys, values, *state, lag, _, _, _ = self.state()
        names = ("x", "weights", "biases", "kinds", "centre", "norms", "eps", "cos", "sin", "keys", "values")
        layer = (self.x, self.given, self.biases, [*self.kinds], None, self.norms, self.eps, *self.rotary)
        found = dict(zip(names, (*layer, keys, values), strict=True)) | changes
        return (*found.values(), *state, self.rules.columns, lag, *self.scores)

    @property
    def rest(self) -> dict[str, Any]:
        return {"rotary": self.rotary, "rules": self.rules, "scores": self.scores}

    def step(self) -> torch.Tensor:
        """Makes the call until there is room for the token."""
        return self.cache.stepped(lambda state: CPU.step_layer(self.x, layer=self.layer, cache=state, **self.rest))

    def expected(self) -> torch.Tensor:
        """The same in float64, once the token is in the cache."""
        cache, rows = self.cache, self.x.shape[0]
        keys, values, table, value_dim = cache.blocks_held().view()
        x, cos, sin = self.x.double(), *(part.double() for part in self.rotary)
        output, gate, up, last = (weight.double() for weight in self.weights[3:])
        normed = normalized(x, self.norms[0].double(), self.eps)
        bias = self.biases[0].double() if self.biases else None
        query = linear(normed, self.weights[0].double(), bias).view(rows, 1, -1, cos.shape[-1]).transpose(1, 2)
        keys, values = ([t.double() if t.is_floating_point() else t for t in side] for side in (keys, values))
        view = CacheView(keys, values, table, value_dim)
        lengths, turned = torch.from_numpy(cache.lengths), rotated(query, Rotary(cos, sin))[:, :, 0]
        mixed, _ = REFERENCE.decode(turned, cache=view, lengths=lengths, rules=self.rules, scores=self.scores)
        hidden = x + linear(mixed.reshape(rows, 1, -1), output)
        normed = normalized(hidden, self.norms[1].double(), self.eps)
        gated = torch.nn.functional.silu(linear(normed, gate)) * linear(normed, up)
        return hidden + linear(gated, last)


def normalized(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def random_rules(rng: random.Random, heads: int, formats: bool) -> RuleTable:
    """Rules of a layer's KV heads, with any formats or native ones."""
    rules = [
        Rule(
            rng.choice((4, 16, 64)),
            rng.choice((0, 7, 40, 128)),
            rng.choice((0, 100, 700, 1024)),
            *((rng.choice([*FORMATS]), rng.choice([*FORMATS])) if formats else ()),
        )
        for _ in range(heads)
    ]
    return RuleTable.of(rules, rng.choice((16, 48)), rng.choice((None, None, 9, 60)))


def build(
    seed: int, dtype: torch.dtype, rows: int | None = None, formats: bool = False, in_strips: bool = False
) -> Case:
    """A random case; `in_strips` for inputs that are multiples of 32."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows, heads, group = rows or rng.randint(1, 9), rng.randint(1, 3), rng.randint(1, 3)
    dim, value_dim, hidden, inner = (
        rng.choice((2, 6, 16, 34)),
        rng.choice((1, 5, 16)),
        rng.randint(1, 70),
        rng.randint(1, 150),
    )
    if in_strips:
        group, value_dim, hidden, inner = 2, 16, rng.choice((64, 256)), rng.choice((96, 512))
    cache = PlanCacheLayer(random_rules(rng, heads, formats))
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
    rotary = Rotary(angles.cos().to(dtype), angles.sin().to(dtype))
    logits = torch.randn(heads * group)
    scores = Scores(rng.choice((0.2, 1.0)), rng.choice((0.0, 3.0)), rng.choice((None, logits)))
    return Case(cache, torch.randn(rows, 1, hidden).to(dtype), weights, biases, norms, rotary, scores)


def in_blocks(seed: int, dtype: torch.dtype, random_blocks: Callable[..., torch.Tensor]) -> Case:
    """A case of which most weights are in blocks, each of a type of its own."""
    rng, case = random.Random(seed), build(seed, dtype, in_strips=True)
    case.blocks, kinds = [], []
    for i, weight in enumerate(case.weights):
        outputs, inputs = weight.shape
        kind = rng.choice([None, *(kind for kind in WEIGHT_TYPES.values() if inputs % kind.numbers == 0)])
        kinds.append(kind.code if kind else NATIVE)
        if kind:
            spread = dequantized(random_blocks(kind, 32, inputs=inputs, scale=1), kind).std()
            weight = random_blocks(kind, outputs, inputs=inputs, scale=1 / float(spread * inputs**0.5))
            case.weights[i] = dequantized(weight, kind)
        case.blocks.append(weight)
    case.kinds = kinds
    return case


of_blocks = pytest.mark.parametrize("of_blocks", [False, True], ids=["plain", "blocks"])


@of_blocks
@pytest.mark.seeds(300)
def test_random_layers(seed, of_blocks, isa, poisoned_memory, random_blocks):
    isa(library.ISAS[seed % len(library.ISAS)])
    dtype = library.DTYPES[seed // 5 % 3]
    case = in_blocks(seed, dtype, random_blocks) if of_blocks else build(seed, dtype, formats=seed % 2 == 1)
    for _ in range(2):
        found, expected = case.step(), case.expected()
        assert found.dtype == dtype
        assert found.shape == expected.shape
        assert bool(((found.double() - expected).abs() <= TOLERANCE[dtype] * (1 + expected.abs().max())).all())


@pytest.mark.parametrize("name", library.ISAS)
@pytest.mark.parametrize("dtype", library.DTYPES)
def test_threads_and_other_rows_change_no_bit(name, dtype, isa, threads):
    isa(name)
    case = build(5, dtype, rows=4)
    case.rotary = Rotary(*(part[:1] for part in case.rotary))
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


@pytest.mark.parametrize("name", library.ISAS)
@pytest.mark.parametrize("dtype", library.DTYPES)
def test_nan_goes_through_and_spoils_no_other_row(name, dtype, isa):
    """The row that has it, and what that row makes of its cache later on: by a whole layer and by layers."""
    isa(name)
    for seed in (5, 6, 7):
        results = []
        for number in (float("nan"), 0.5):
            case = build(seed, dtype, rows=4)
            case.scores = Scores(case.scores.scaling)
            case.x[2, 0, 0] = number
            first = case.step()
            case.x = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            allocate(case)
            out, *rest = read(case).step(case.x, case.rotary, 0)
            assert rest == [2, None]
            results.append((first, out))
        others = torch.tensor([0, 1, 3])
        for mine, clean in zip(*results, strict=True):
            assert mine[2].isnan().all()
            assert not clean.isnan().any()
            assert torch.equal(mine[others], clean[others])


def test_bad_arguments_are_refused():
    case = build(8, torch.float32, rows=2)
    case.biases = []
    before = [array.copy() for array in case.arrays]
    hidden, dim, heads = case.x.shape[2], case.rotary.cos.shape[-1], len(case.cache.rules)

    def refused(match, **changes):
        with pytest.raises(RuntimeError, match=match):
            torch.ops.moacompress_cpu.step_layer(*case.arguments(**changes))
        assert all(np.array_equal(a, b) for a, b in zip(before, case.arrays, strict=True))

    def weights(at, change):
        return [change(w).contiguous() if i == at else w for i, w in enumerate(case.weights)]

    refused("6 weights, 0 biases and 2 norms", weights=case.weights[:6])
    refused("bias has the shape", biases=[torch.zeros(1)] * 3)
    refused("centre of the keys has the shape", centre=torch.zeros(heads, dim + 1))
    refused("both must have 3 dimensions", cos=case.rotary.cos[0])
    refused("not an even number", cos=torch.randn(2, 1, dim - 1), sin=torch.randn(2, 1, dim - 1))
    refused("sin has the shape", sin=torch.randn(1, 1, dim + 2))
    refused("rotary embeddings of 3 rows for 2", sin=torch.randn(3, 1, dim))
    refused("eps is -1", eps=-1.0)
    refused("6 kinds of 7 weights", kinds=[0] * 6)
    refused("weight 6 is of the kind -1", kinds=[0] * 6 + [-1])
    refused("a norm has the shape", norms=[case.norms[0], case.norms[1][1:]])
    refused("input has the shape", x=torch.randn(2, 2, hidden))
    refused("weight 0 has", weights=weights(0, lambda w: w[1:]))
    refused("weight 1 has", weights=weights(1, lambda w: w.repeat(2, 1)))
    refused("weight 2 has", weights=weights(2, lambda w: w[1:]))
    refused("weight has the shape", weights=weights(3, lambda w: w.repeat(1, 2)))
    for at in (3, 4, 5, 6):
        double = weights(at, lambda w: w.repeat(2, 1))
        refused("outputs; the first and last must be|weight has the shape", weights=double)
        refused("weight has another dtype", weights=weights(at, torch.Tensor.half))
    assert torch.ops.moacompress_cpu.step_layer(*case.arguments())[1] in (0, 1)


def read(case: Case) -> BoundCaches:
    """Reads a case's layer, twice over as if there were two, and its cache."""
    rules, dim = [case.rules] * 2, case.rotary.cos.shape[-1]
    layers = CPU.read_layers([case.layer] * 2, head_dim=dim, rules=rules, scaling=case.scores.scaling)
    caches = layers.read_caches([case.state()] * 2)
    caches.layers = layers  # type: ignore[attr-defined]  # they do not keep them
    return caches


def allocate(case: Case) -> None:
    case.cache.blocks_held().pool.grow(100, 0)
    case.cache.blocks_held().table.widen(20)


def plain(case: Case) -> Case:
    """A case without softcap and learned logits, with room for some tokens."""
    case.scores = Scores(case.scores.scaling)
    case.step()
    allocate(case)
    return case


@of_blocks
@pytest.mark.parametrize("seed", range(9))
def test_layers_one_after_the_other(seed, of_blocks, random_blocks):
    """As one by one; both of them have the same weights and, to make it simple, the same cache."""
    dtype = library.DTYPES[seed % 3]
    case, other = (
        plain(in_blocks(seed, dtype, random_blocks) if of_blocks else build(seed, dtype, 2)) for _ in range(2)
    )
    caches = read(case)
    found = caches.step(case.x, case.rotary, 0)
    assert found[1:] == (2, None)
    other.x = other.step()
    assert torch.equal(other.step(), found[0])
    again = caches.step(other.x, case.rotary, 1)
    assert again[1:] == (2, None)
    assert torch.equal(other.step(), again[0])


def test_weights_that_were_moved_are_seen():
    case = plain(build(8, torch.float32, 2))
    caches = read(case)
    assert caches.step(case.x, case.rotary, 0)[1:] == (2, None)
    lengths = case.cache.lengths.copy()
    case.weights[4].data = case.weights[4].data.clone()
    with pytest.raises(WeightsMoved):
        caches.step(case.x, case.rotary, 0)
    assert np.array_equal(lengths, case.cache.lengths)


def test_what_is_read_is_checked():
    case = plain(build(8, torch.float32, 2))
    case.biases = []
    rules, ops = case.rules.columns, torch.ops.moacompress_cpu
    heads, gated = rules.shape[1], rules.clone()
    gated[COLUMNS.index("select_alpha")], gated[COLUMNS.index("native_window")] = 5, 0
    good = {
        "weights": case.weights,
        "biases": [],
        "kinds": [],
        "centres": [torch.zeros(0)],
        "norms": case.norms,
        "eps": case.eps,
        "head_dim": case.rotary.cos.shape[-1],
        "rules": [rules],
        "scaling": 0.5,
        "shares": torch.zeros(0, 2, dtype=torch.int64),
        "gates": [],
    }
    for match, changes in (
        ("2 norms and 0 centres for 1 layers", {"centres": []}),
        ("3 kinds of 7 weights", {"kinds": [0] * 3}),
        ("no multiple of the 256 numbers of a block|weight has another dtype", {"kinds": [5] + [0] * 6}),
        ("layer 0 keeps tokens by their score, and has no gate for that", {"rules": [gated]}),
        ("1 parts of gates for 1 layers", {"gates": [torch.zeros(1)]}),
        (
            r"a gate has the shape \[\d+, \d+\], not",
            {"rules": [gated], "gates": [torch.zeros(1, 99), torch.zeros(heads)]},
        ),
        ("for 2 layers", {"rules": [rules, rules]}),
        ("KV heads of 0", {"head_dim": 0}),
        ("scaling is 0", {"scaling": 0.0}),
        ("shares has the shape", {"shares": torch.zeros(1, 2, dtype=torch.int64)}),
        ("layer 0 shares with layer 0", {"shares": torch.zeros(1, 1 + 2 * heads, dtype=torch.int64)}),
    ):
        with pytest.raises(RuntimeError, match=match):
            ops.read_layers(*(good | changes).values())
    layers, state = ops.read_layers(*good.values()), case.state()

    def read_caches(of, states, lag=0):
        keys, values = [t for state in states for t in state.keys], [t for state in states for t in state.values]
        parts = [
            t for state in states for t in (state.table, state.lengths, state.runs, state.refs, *[torch.zeros(0)] * 2)
        ]
        return ops.read_caches(of, keys, values, [len(state.keys) for state in states], [], parts, lag)

    for match, of, states, lag in (
        ("2 numbers of segments and 12 parts of caches for 1 layers", layers, [state, state], 0),
        ("0 segments of layer 0", layers, [state._replace(keys=[], values=[])], 0),
        ("segments of layer 0, of .* of keys and 0 of values", layers, [state._replace(values=[])], 0),
        ("lengths has another dtype", layers, [state._replace(lengths=state.lengths.int())], 0),
        ("refs counts", layers, [state._replace(refs=state.refs[:-1].clone())], 0),
        ("lag is -1", layers, [state], -1),
        ("no layers of the number 0", 0, [state], 0),
    ):
        with pytest.raises(RuntimeError, match=match):
            read_caches(of, states, lag)
    caches = read_caches(layers, [state])
    with pytest.raises(RuntimeError, match="input has the shape"):
        ops.step_layers(case.x[:1], *case.rotary, caches, 0)
    with pytest.raises(RuntimeError, match="first layer is 1 of 1"):
        ops.step_layers(case.x, *case.rotary, caches, 1)
    with pytest.raises(RuntimeError, match="cos has the shape"):
        ops.step_layers(case.x, case.rotary.cos[..., 1:], case.rotary.sin, caches, 0)
    with pytest.raises(RuntimeError, match="layer 1 of 1"):
        ops.read_cache(caches, 1, state.keys, state.values, [], [state.table, state.lengths, state.runs, state.refs], 0)
    library.forget_caches(caches)
    library.forget_caches(caches)
    with pytest.raises(RuntimeError, match="no caches of the number"):
        ops.step_layers(case.x, *case.rotary, caches, 0)
    library.forget_layers(layers)


def test_fakes_have_the_shapes_of_the_real_ones():
    case = build(11, torch.float32, rows=2)
    assert case.step() is not None  # there is room for another token
    arguments = case.arguments()
    state = arguments[9:]
    heads, dim, value_dim = len(case.cache.rules), case.rotary.cos.shape[-1], state[1][0].shape[-1]
    token = tuple(torch.randn(2, n, 1, d) for n, d in ((heads * 2, dim), (heads, dim), (heads, value_dim)))
    unscored = (*state[:-1], None, [], None)
    for name, given in (("step", (*token, *unscored)), ("step_layer", arguments)):
        operator = getattr(torch.ops.moacompress_cpu, name).default
        torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))
