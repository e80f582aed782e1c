"""The profile's compiled sweep equals its reference: gradients, deltas and baselines, whatever is asked of it."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile import influence
from moacompress.calibration.profile.choices import choices_of
from moacompress.calibration.profile.collectors import BaselineSums, InfluenceSums, TokenSums
from moacompress.calibration.profile.influence import ProfiledAttention, attend, attend_backward
from moacompress.calibration.profile.sample_statistics import sample_statistics
from moacompress.calibration.profile.tiles import AttentionSpec, Collector, TileView
from moacompress.kernels.arguments import Choices, as_tensors
from moacompress.kernels.cpu import library
from moacompress.kernels.dispatch import REFERENCE
from moacompress.models.source import model_shape
from moacompress.recipe_sections import ProfileRecipe
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import COLUMNS, RuleTable
from tests import oracle

pytestmark = pytest.mark.usefixtures("isa")
"""Skips where the kernels cannot run, and leaves the best instruction set behind."""

OPS = torch.ops.moacompress_cpu
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of gradients, which are rounded to the dtype; sums are made in float32 whatever the dtype."""
SUMS = 5e-6


@dataclass
class Case:
    """One layer and the rules it is asked about."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor
    spec: AttentionSpec
    sink_logit: Tensor | None
    table: RuleTable
    choices: Choices | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        return self.key.shape[1], len(self.table)

    def exact(self) -> Case:
        wide = {name: getattr(self, name).double() for name in ("query", "key", "value", "grad")}
        return replace(self, sink_logit=None if self.sink_logit is None else self.sink_logit.double(), **wide)

    def backward(self, collectors: Sequence[Collector]) -> tuple[Tensor, ...]:
        chunk = (self.query, self.key, self.value, self.grad)
        return attend_backward(*chunk, self.spec, self.sink_logit, self.table, collectors, choices=self.choices)

    def arguments(self, **changes: Any) -> list[Any]:
        """What the operator gets."""
        named = {
            "dout": self.grad,
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "rules": as_tensors(self.table.in_layer(self.spec.native_window)).columns,
            "scaling": self.spec.scaling,
            "softcap": self.spec.softcap or 0.0,
            "sink_logits": self.sink_logit,
            "baselines": True,
            "lag": None,
            "evicted": None if self.choices is None else self.choices.evicted,
            "of_rule": None if self.choices is None else self.choices.of_rule,
        }
        assert changes.keys() <= named.keys()
        return list((named | changes).values())


def build(seed: int, dtype: torch.dtype, **fixed: Any) -> Case:
    """Returns a random case; `fixed` sets what the names below say."""
    rng = random.Random(seed)
    torch.manual_seed(seed)

    def pick(name: str, *of: Any) -> Any:
        selected = rng.choice(of)
        return fixed.get(name, selected)

    kv_heads, group = pick("kv_heads", 1, 2, 3), pick("group", 1, 2, 3, 4)
    dim, n = pick("dim", 16, 24, 33, 64, 80, 128, 17, 256), pick("n", rng.randint(1, 300), rng.randint(1, 40), 64, 128)
    heads = kv_heads * group

    def rows(count: int) -> Tensor:
        if rng.random() < 0.5:  # as a layer's projections leave them
            return torch.randn(1, n, count, dim).to(dtype).transpose(1, 2)
        return torch.randn(1, count, n, dim + 3).to(dtype)[..., :dim]

    query, key, value, grad = rows(heads), rows(kv_heads), rows(kv_heads), rows(heads)
    query = query * pick("sharpness", 1, 1, 4)
    if pick("silent", False, False, True):
        grad = grad.contiguous()
        grad[:, :, torch.rand(n) < rng.choice([0.1, 0.5, 0.95])] = 0
    windows = ((0, 1024), (16, 0), (40, 0), (128, 0), (0, 100), (9, 300), (0, 700), (100, 200))
    drawn = [Rule(rng.choice([4, 16, 64]), *rng.choice(windows)) for _ in range(rng.randint(0, 14))]
    table = RuleTable.of([Rule.FULL, *drawn], pick("min_window", 16, 32))
    return Case(
        query=query,
        key=key,
        value=value,
        grad=grad,
        spec=AttentionSpec(
            pick("scaling", dim**-0.5, 0.3 * dim**-0.25),
            pick("native", None, None, 1, 9, 60, 150),
            pick("softcap", None, None, 2.0, 30.0),
        ),
        sink_logit=torch.randn(heads) * 2 if pick("logits", False, True) else None,
        table=table,
    )


def with_gates(case: Case, seed: int) -> Case:
    """Lets rules of a case select, by random scores with ties or without."""
    rng = random.Random(-1 - seed)
    selects = ((0, 0), (5, 0), (30, 0), (0, 200), (3, 600), (0, 1024))
    drawn = ((rule, *rng.choice(selects)) for rule in case.table.rules)
    rules = [replace(rule, select_alpha=alpha, select_beta_q=beta_q) for rule, alpha, beta_q in drawn]
    table = RuleTable.of([Rule.FULL, *rules[1:]], int(case.table.span.min_window[0]))
    few, generator = rng.choice((3, 30000)), torch.Generator().manual_seed(seed)
    scores = torch.randint(-few, few, case.key.shape[1:3], generator=generator).to(torch.int16)
    return replace(case, table=table, choices=choices_of(table.in_layer(case.spec.native_window), scores))


def sums(case: Case) -> tuple[InfluenceSums, BaselineSums]:
    return InfluenceSums(*case.sizes), BaselineSums(*case.sizes)


def close(found: Tensor, expected: Tensor, tolerance: float, scale: Tensor | float | None = None) -> None:
    assert found.shape == expected.shape
    assert not found.isnan().any()
    most = expected.abs().max() if scale is None else scale
    error = (found.double() - expected.double()).abs() / (most + 1e-30)
    assert float(error.max()) < tolerance, float(error.max())


class Sizes:
    """Keeps `sum |d|` of every head and rule: what the rounding of their sum is measured by."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0

    def add(self, view: TileView) -> None:
        self.total = self.total + view.deltas.abs().sum(1)


@pytest.mark.seeds(320)
def test_random_configurations(seed: int, isa: Callable[[str], None], poisoned_memory: None) -> None:
    isa(library.ISAS[seed % len(library.ISAS)])
    dtype = library.DTYPES[seed // 5 % 3]
    case = build(seed, dtype)
    if seed // 15 % 2:  # with every instruction set and dtype
        case = with_gates(case, seed)
    exact, sizes = sums(case), Sizes()
    wanted = case.exact().backward([*exact, sizes])
    *gradients, found, none, alive = OPS.profile_backward(*case.arguments())
    assert none.shape == (case.sizes[0], 0)
    assert alive == int(case.grad.ne(0).any(-1).any(1).sum())
    for mine, other in zip(gradients, wanted, strict=True):
        assert mine.dtype == dtype
        close(mine, other, TOLERANCE[dtype])
    largest = torch.as_tensor(sizes.total, dtype=torch.float64).max()
    close(found[0], exact[0].squares, 2 * SUMS)
    close(found[1], exact[0].total, SUMS, largest)
    close(found[2], exact[1].moa, 10 * SUMS)
    close(found[3] / max(1, alive), exact[1].mass, SUMS)
    assert not found[:2, :, 0].any()  # the full rule changes nothing
    # exactly zero where a rule sees what the layer sees
    assert not found[0][exact[0].squares == 0].any()
    assert not found[2][exact[1].moa == 0].any()
    assert not found[3][exact[1].moa == 0].any()
    lag = random.Random(seed).choice((0, 1, 7, 32, 150))
    tokens = TokenSums(case.sizes[0], case.key.shape[2], lag)
    case.exact().backward([tokens])
    only = OPS.profile_backward(*case.arguments(baselines=False, lag=lag))
    assert torch.equal(only[3], found[:2])
    close(only[4], tokens.of_tokens, 4 * SUMS)
    assert not only[4][tokens.of_tokens == 0].any()
    assert all(torch.equal(a, b) for a, b in zip(only[:3], gradients, strict=True))


def by_definition(case: Case) -> tuple[list[Tensor], Tensor, Tensor]:
    """Returns gradients; the sums of squares and totals of d; and where the baselines' are NaN, `[2, kv_heads, rules]`."""
    case, spec = case.exact(), case.spec
    kv_heads, tokens = case.key.shape[1:3]
    n = case.grad[0].ne(0).any(-1).any(0).nonzero()[:, 0] + 1
    query, key, value = leaves = [t[0].detach().requires_grad_() for t in (case.query, case.key, case.value)]
    query, grad = (t.unflatten(0, (kv_heads, -1))[:, :, n - 1] for t in (query, case.grad[0]))
    logits = None if case.sink_logit is None else case.sink_logit.view(kv_heads, -1)
    every, outs = oracle.visible(Rule.FULL, tokens, 1, spec.native_window)[n - 1], []
    sums, spoilt = torch.zeros(2, *case.sizes, dtype=torch.float64), torch.zeros(2, *case.sizes, dtype=torch.bool)

    for head in range(kv_heads):
        rest = (spec.scaling, spec.softcap, None if logits is None else logits[head])
        dense, lse = oracle.attend_head(query[head], key[head], value[head], every, *rest)
        outs.append(dense)
        pulled = (dense * grad[head]).sum(-1)
        for rule, min_window in enumerate(case.table.span.min_window):
            would = oracle.visible(case.table.rules[rule], tokens, int(min_window), spec.native_window)[n - 1]
            moved = oracle.attend_head(query[head], key[head], value[head], would, *rest)[0] - dense
            hides = (would != every).any(-1)
            spoilt[:, head, rule] = torch.stack([(t.isnan() & hides).any() for t in (pulled, lse)])
            deltas = (moved * grad[head]).sum((0, 2)).detach().masked_fill(~hides, 0)
            sums[:, head, rule] = torch.stack((deltas.square().sum(), deltas.sum()))
    return list(torch.autograd.grad(outs, leaves, list(grad))), sums, spoilt


@functools.lru_cache(4)  # for all instruction sets, which come one after the other
def spoilt_by_nan(seed: int, dtype: torch.dtype, what: str) -> list[tuple[Case, tuple[list[Tensor], Tensor, Tensor]]]:
    """Returns a case with a NaN and one without, and what each must give."""
    rng = random.Random(seed)
    sizes = {"n": rng.choice((70, 90)), "dim": rng.choice((16, 33)), "group": rng.choice((1, 3))}
    native, softcap = rng.choice((None, 60)), rng.choice((None, 30.0))
    case, other = (build(seed, dtype, native=native, softcap=softcap, **sizes) for _ in range(2))
    changed = getattr(other, what)
    head, token = rng.randrange(changed.shape[1]), rng.choice(other.grad[0].ne(0).any(-1).any(0).nonzero()).item()
    changed[0, head, token, rng.randrange(sizes["dim"])] = float("nan")
    return [(one, by_definition(one)) for one in (other, case)]


@pytest.mark.parametrize("name", library.ISAS)
@pytest.mark.parametrize("what", ["query", "key", "value", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_reaches_what_sees_it(
    name: str,
    dtype: torch.dtype,
    what: str,
    isa: Callable[[str], None],
    unchanged_or_as: Callable[..., None],
) -> None:
    """Gradients of the rows and keys that it has a part in, and the sums of its KV head; no other bit changes."""
    isa(name)
    for seed in (0, 10):
        found, exact, baselines = [], [], []
        for one, (wanted, wanted_sums, spoilt) in spoilt_by_nan(seed, dtype, what):
            *gradients, sums, _, _ = OPS.profile_backward(*one.arguments())
            found.append([t[0] for t in gradients] + [sums[:2]])
            exact.append([*wanted, wanted_sums])
            assert wanted_sums.any()
            assert torch.equal(sums[2:].isnan(), spoilt)
            baselines.append(sums[2:])
        unchanged_or_as(*found, *exact, TOLERANCE[dtype] * 4)
        clean = ~baselines[0].isnan()
        assert torch.equal(baselines[0][clean], baselines[1][clean])


@pytest.mark.parametrize("name", library.ISAS)
def test_threads_change_no_bit(name: str, isa: Callable[[str], None], threads: Callable[[int], None]) -> None:
    isa(name)
    for seed, native in ((1, None), (2, 70)):
        case = build(seed, torch.float32, n=290, kv_heads=2, group=3, dim=48, native=native)
        results = []
        for count in (1, 2, 17, 17):
            threads(count)
            results.append(OPS.profile_backward(*case.arguments(lag=5)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0][:5], other[:5], strict=True))


def test_a_group_of_more_heads_than_a_tile_has_lanes() -> None:
    case = build(3, torch.float32, n=60, kv_heads=1, group=150, dim=16, native=None)
    exact = sums(case)
    wanted = case.exact().backward(exact)
    *gradients, found, _, _ = OPS.profile_backward(*case.arguments())
    for mine, other in zip((*gradients, found[0]), (*wanted, exact[0].squares), strict=True):
        close(mine, other, 1e-5)


def test_a_window_that_holds_almost_nothing_is_exact() -> None:
    """Rows whose window has 1e-6 of the probability, and rows that leave as little out."""
    torch.manual_seed(0)
    n, size = 300, 8
    query, grad = torch.randn(2, 1, 1, n, size)
    key, value = torch.randn(2, 1, 1, n, size)
    key[:, :, 5:60] = 0
    key[:, :, 5:60, 0], query[..., 0] = 14.0, 3.0
    rules = (Rule.FULL, Rule(4, 32, 0), Rule(64, 128, 0))
    case = Case(query, key, value, grad, AttentionSpec(size**-0.5), None, RuleTable.of(rules, 16))
    exact, found = sums(case), sums(case)
    case.exact().backward(exact)
    case.backward(found)
    for mine, other in (
        (found[0].squares, exact[0].squares),
        (found[1].moa, exact[1].moa),
        (found[1].mass, exact[1].mass),
    ):
        close(mine[:, 1], other[:, 1], 2e-5)
        # one by one: what the last rule changes is a millionth of it. Its deltas are small differences of float32 numbers
        close(mine[:, 2], other[:, 2], 2e-5 if mine is not found[0].squares else 2e-2)


def test_what_looks_at_tiles_gets_them_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another collector changes no bit of the sums and gradients."""
    case = build(5, torch.float32, n=100)
    alone, shared_values, tiles, reference = sums(case)[0], sums(case)[0], Sizes(), sums(case)[0]
    gradients = case.backward([alone])
    for mine, other in zip(case.backward([tiles, shared_values]), gradients, strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(shared_values.squares, alone.squares)
    assert torch.is_tensor(tiles.total)
    assert tiles.total.any()
    monkeypatch.setattr(influence, "backend_for", lambda query: REFERENCE)
    for mine, other in zip(case.backward([reference]), gradients, strict=True):
        close(mine, other, 1e-5)
    close(alone.squares, reference.squares, 1e-5)


@pytest.mark.seeds(40)
def test_the_forward_is_that_of_the_reference(seed: int) -> None:
    case = build(seed, torch.float32)
    exact = case.exact()
    wanted = attend(exact.query, exact.key, exact.value, exact.spec, exact.sink_logit)
    found = attend(case.query, case.key, case.value, case.spec, case.sink_logit)
    assert ((found - wanted).abs() / (1 + wanted.abs())).max() < 2e-5


def test_through_autograd() -> None:
    case = build(9, torch.bfloat16, n=70, native=None)
    leaves = [tensor.detach().requires_grad_() for tensor in (case.query, case.key, case.value)]
    collector = sums(case)[0]
    out = ProfiledAttention.apply(*leaves, case.sink_logit, case.spec, case.table, [collector])  # type: ignore[no-untyped-call]
    # a cotangent whose last dimension is not contiguous
    out.backward(case.grad.transpose(2, 3).contiguous().transpose(2, 3))
    for leaf, wanted in zip(leaves, case.backward([]), strict=True):
        assert torch.equal(leaf.grad, wanted)  # type: ignore[arg-type]
    assert collector.squares.any() or not case.sizes[1] > 1


def test_bad_arguments_are_refused() -> None:
    case = build(7, torch.float32, n=20, kv_heads=2, group=2, dim=16, logits=True, native=None, softcap=None)

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(RuntimeError, match=match):
            OPS.profile_backward(*case.arguments(**changes))

    OPS.profile_backward(*case.arguments())
    columns = as_tensors(case.table).columns

    def table(*numbers: tuple[int, int, int, int, int]) -> Tensor:
        return torch.tensor([(*number, 0, 0, 0, 0) for number in numbers]).T.contiguous()

    refused(r"value has the shape \[1, 2, 19, 16\], not \[1, 2, 20, 16\]", value=case.value[:, :, :19])
    refused("4 query heads are no multiple of 3 KV heads", key=case.key[:, :1].expand(1, 3, -1, -1))
    refused("the batch has 2 rows", query=case.query.expand(2, -1, -1, -1))
    refused(r"table of rules has the shape \[2, \d+\], not \[9, any\]", rules=columns[:2])
    refused("there are no rules to ask for", rules=columns[:, :0].contiguous())
    refused("rule 1 has sink 4, alpha 0, beta_q 1025", rules=table((4, 0, 0, 16, 0), (4, 0, 1025, 16, 0)))
    refused("rule 1 has sink -4", rules=table((4, 0, 0, 16, 0), (-4, 0, 0, 16, 0)))
    refused("min_window is 0, less than 1, at rule 0", rules=table((4, 0, 0, 0, 0)))
    refused("native_window is -1 at rule 0", rules=table((4, 0, 0, 16, -1)))
    refused("native windows of 0 and of 7 in one layer", rules=table((4, 0, 0, 16, 0), (4, 0, 0, 16, 7)))
    quantized = columns.clone()
    quantized[COLUMNS.index("value_format"), 0] = 1
    refused("rule 0 has the formats 0 and 1; this is done with native ones", rules=quantized)
    refused("softcap is -1", softcap=-1.0)
    refused("lag is -1, less than 0", lag=-1)
    evicted, of_rule = torch.zeros(2, 1, 20, dtype=torch.int32), torch.zeros(len(columns.T), dtype=torch.int64)
    refused("evicted and of_rule go together", evicted=evicted)
    refused(r"evicted has the shape \[2, 1, 19\], not \[2, 1, 20\]", evicted=evicted[:, :, :19], of_rule=of_rule)
    refused("rule 0 selects in way 1 of 1", evicted=evicted, of_rule=of_rule + 1)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_statistics_of_a_model(family: str, tiny_model: Callable[..., Any], use_backend: Callable[[str], Any]) -> None:
    """A whole sample, through the choice that the environment makes."""
    model = tiny_model(family)
    shape, selected = model_shape(model), ProfileRecipe(draws=2, baselines=True)
    ids = np.random.default_rng(0).integers(3, 150, 200)
    sample = Sample(ids, np.arange(200) >= 185, "random", 200)
    rules = (Rule.FULL, Rule(4, 16, 0), Rule(16, 40, 0), Rule(64, 0, 300), Rule(4, 20, 200))
    found = []
    for kernel in ("reference", "cpu"):
        use_backend(kernel)
        found.append(sample_statistics(model, shape, RuleTable.of(rules, 16), sample, selected, 0, 0))
    reference, compiled = found
    assert reference.arrays.keys() == compiled.arrays.keys()
    for name, wanted in reference.arrays.items():
        # a number half-way between two codes may get either of them
        most = 0.01 if name.startswith(("key", "value")) else 1e-4
        assert np.abs(compiled.arrays[name] - wanted).max() <= most * np.abs(wanted).max(), name


def test_the_fake_has_the_shapes_of_the_real_one() -> None:
    arguments = tuple(build(4, torch.float32).arguments(lag=3))
    torch.library.opcheck(OPS.profile_backward.default, arguments, test_utils=("test_schema", "test_faketensor"))
