"""The tiled float32 pass against the definition: dense float64 attention with and without the rule's explicit mask."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moacompress.calibration.profile.collectors import BaselineSums, InfluenceSums
from moacompress.calibration.profile.influence import ProfiledAttention, attend, attend_backward
from moacompress.calibration.profile.tiles import AttentionSpec, TileView
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from tests import oracle

MIN_WINDOW = 16
SPANS = ((16, 0), (32, 0), (0, 256), (9, 700), (90, 0))
RULES = (Rule.FULL, *(Rule(sink, alpha, beta) for sink in (4, 16, 64) for alpha, beta in SPANS))


TABLE = RuleTable.of(RULES, MIN_WINDOW)


@dataclass(frozen=True)
class Case:
    """One layer: its sizes and what is special about its attention."""

    n: int
    heads: int
    kv_heads: int
    native: int | None = None
    softcap: float | None = None
    learned_sink: bool = False
    sharpness: float = 1.0

    def draw(self) -> tuple[list[Tensor], Tensor | None, AttentionSpec]:
        torch.manual_seed(self.n + self.heads)
        size = 8
        query, grad = torch.randn(2, 1, self.heads, self.n, size, dtype=torch.float64)
        key, value = torch.randn(2, 1, self.kv_heads, self.n, size, dtype=torch.float64)
        sink = torch.randn(self.heads, dtype=torch.float64) + 1 if self.learned_sink else None
        return [query * self.sharpness, key, value, grad], sink, AttentionSpec(size**-0.5, self.native, self.softcap)


def dense(query: Tensor, key: Tensor, value: Tensor, sink: Tensor | None, spec: AttentionSpec, mask: Tensor) -> Tensor:
    return oracle.attend(query, key, value, mask, spec.scaling, spec.softcap, sink)


CASES = {
    "mha": Case(150, 4, 4),
    "gqa": Case(200, 6, 2),
    "one tile exactly": Case(64, 4, 2),
    "shorter than a window": Case(9, 4, 2),
    "peaked": Case(170, 4, 2, sharpness=6.0),
    "native window": Case(190, 4, 2, native=40),
    "native window wider than the rules": Case(190, 4, 2, native=120),
    "native window wider than the row": Case(100, 4, 2, native=300),
    "softcap": Case(130, 4, 2, softcap=2.0, sharpness=3.0),
    "learned sink": Case(150, 4, 2, learned_sink=True),
    "everything": Case(201, 6, 3, native=70, softcap=3.0, learned_sink=True, sharpness=2.0),
}


class Keep:
    """A collector that keeps every delta."""

    def __init__(self, n: int, kv_heads: int, rules: int) -> None:
        self.deltas = torch.zeros(kv_heads, n, rules, dtype=torch.float64)

    def add(self, view: TileView) -> None:
        self.deltas[:, view.rows] = view.deltas.double()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_deltas_and_gradients_match_the_definition(case: Case) -> None:
    (query, key, value, grad), sink, spec = case.draw()
    theirs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    full = oracle.visible(Rule.FULL, case.n, MIN_WINDOW, case.native)
    now = dense(theirs[0], theirs[1], theirs[2], sink, spec, full)
    now.backward(grad)
    wanted = []
    for rule in RULES:
        under = dense(query, key, value, sink, spec, oracle.visible(rule, case.n, MIN_WINDOW, case.native))
        wanted.append((grad * (under - now.detach())).sum(-1)[0].view(case.kv_heads, -1, case.n).sum(1))
    expected = torch.stack(wanted, -1)

    ours = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    sums = [InfluenceSums(case.kv_heads, len(RULES))]
    out = ProfiledAttention.apply(*ours, sink, spec, TABLE, sums)  # type: ignore[no-untyped-call]
    assert torch.allclose(out, now, atol=1e-12)
    out.backward(grad)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert float((mine.grad - other.grad).abs().max()) < 1e-10
    q, k, v, g = (tensor.float() for tensor in (query, key, value, grad))
    s = None if sink is None else sink.float()
    assert torch.allclose(attend(q, k, v, spec, s).double(), now, atol=2e-6)
    keep = Keep(case.n, case.kv_heads, len(RULES))
    attend_backward(q, k, v, g, spec, s, TABLE, [keep])
    assert float((keep.deltas - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert (keep.deltas[..., RULES.index(Rule.FULL)] == 0).all()
    assert (keep.deltas[expected == 0] == 0).all()  # exactly zero where the rule masks nothing


@pytest.mark.parametrize("tile", [1, 13, 500])
def test_tile_size_does_not_matter(tile: int) -> None:
    case = CASES["everything"]
    (query, key, value, grad), sink, spec = case.draw()
    whole, tiled = Keep(case.n, 3, len(RULES)), Keep(case.n, 3, len(RULES))
    first = attend_backward(query, key, value, grad, spec, sink, TABLE, [whole])
    second = attend_backward(query, key, value, grad, spec, sink, TABLE, [tiled], tile=tile)
    assert torch.allclose(whole.deltas, tiled.deltas, atol=1e-11)
    for a, b in zip(first, second, strict=True):
        assert torch.allclose(a, b, atol=1e-11)


def test_rows_without_cotangent_take_no_part() -> None:
    (query, key, value, grad), sink, spec = CASES["gqa"].draw()
    rows = torch.tensor([3, 70, 71, 150])
    sparse = torch.zeros_like(grad)
    sparse[:, :, rows] = grad[:, :, rows]
    seen: list[Tensor] = []

    class Rows(Keep):
        def add(self, view: TileView) -> None:
            seen.append(view.rows)
            super().add(view)

    some, full = Rows(200, 2, len(RULES)), Keep(200, 2, len(RULES))
    attend_backward(query, key, value, sparse, spec, sink, TABLE, [some])
    attend_backward(query, key, value, grad, spec, sink, TABLE, [full])
    assert torch.cat(seen).tolist() == rows.tolist()
    assert torch.allclose(some.deltas[:, rows], full.deltas[:, rows], atol=1e-12)
    none = attend_backward(query, key, value, torch.zeros_like(grad), spec, sink, TABLE, [Keep(200, 2, len(RULES))])
    assert all(not gradient.any() for gradient in none)


def test_a_window_that_holds_almost_nothing_is_exact() -> None:
    """Rows whose window has 1e-6 of the probability: sums that began at the far end would lose it in float32."""
    (query, key, value, grad), _, spec = Case(300, 2, 1).draw()
    key[:, :, 5:60] = 0
    key[:, :, 5:60, 0], query[..., 0] = 14.0, 3.0
    rule = (Rule.FULL, Rule(4, 32, 0))
    full = dense(query, key, value, None, spec, oracle.visible(Rule.FULL, 300, MIN_WINDOW, None))
    under = dense(query, key, value, None, spec, oracle.visible(rule[1], 300, MIN_WINDOW, None))
    expected = (grad * (under - full)).sum(-1)[0].sum(0)
    q, k, v, g = (tensor.float() for tensor in (query, key, value, grad))
    keep = Keep(300, 1, 2)
    attend_backward(q, k, v, g, spec, None, RuleTable.of(rule, MIN_WINDOW), [keep])
    assert float((keep.deltas[0, :, 1] - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_bfloat16_computes_in_float32() -> None:
    (query, key, value, grad), sink, spec = CASES["gqa"].draw()
    low = [tensor.bfloat16() for tensor in (query, key, value, grad)]
    deltas = []
    for q, k, v, g in (low, [tensor.float() for tensor in low]):
        keep = Keep(200, 2, len(RULES))
        gradients = attend_backward(q, k, v, g, spec, sink, TABLE, [keep])
        assert [gradient.dtype for gradient in gradients] == [q.dtype] * 3
        deltas.append(keep.deltas)
    assert torch.allclose(deltas[0], deltas[1], atol=1e-12)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_estimators_of_others_match_their_definition(case: Case) -> None:
    """MoA's |E| and the masked probability from whole float64 matrices."""
    (query, key, value, grad), sink, spec = case.draw()
    sums = BaselineSums(case.kv_heads, len(RULES))
    attend_backward(query, key, value, grad, spec, sink, TABLE, [sums])
    group = case.heads // case.kv_heads
    eye = torch.eye(case.n, dtype=torch.float64).expand(1, case.kv_heads, -1, -1)
    full = oracle.visible(Rule.FULL, case.n, MIN_WINDOW, case.native)
    p = dense(query, key, eye, sink, spec, full)[0]
    g = grad[0] @ value[0].repeat_interleave(group, 0).mT
    effect = (p * (g - (p * g).sum(-1, keepdim=True)) / (1 - p).clamp_min(torch.finfo(p.dtype).eps)).abs()
    for index, rule in enumerate(RULES):
        hidden = full & ~oracle.visible(rule, case.n, MIN_WINDOW, case.native)
        moa = (effect * hidden).sum((1, 2)).view(case.kv_heads, -1).sum(1)
        mass = (p * hidden).sum(-1).view(case.kv_heads, -1).mean(1)
        assert torch.allclose(sums.moa[:, index], moa, rtol=1e-6, atol=1e-12)
        assert torch.allclose(sums.mass[:, index], mass, rtol=1e-6, atol=1e-12)
