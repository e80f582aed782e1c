"""The gradient in what gates score: what outputs gain by each key, found by taking it away or adding it."""

from __future__ import annotations

import random
import types
from typing import Any

import pytest
import torch

from moacompress.core.errors import UnsupportedError
from moacompress.rules.formats import FORMATS
from moacompress.rules.rule import Rule
from moacompress.runtime.decode.attention import attention_forward
from moacompress.runtime.decode.context import CONTEXT, LayerCall, LayerContext
from moacompress.runtime.decode.gate_gradients import MUCH, WIDTH
from tests import oracle

MODULE: Any = types.SimpleNamespace(is_causal=True)
MIN_WINDOW = 16
DIM, GROUP = 8, 2


class Case:
    """Random rules, tokens and scores of one layer."""

    def __init__(self, seed: int, formats: bool = False, dtype: torch.dtype = torch.float64) -> None:
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.rows, self.n = rng.choice((1, 1, 2, 3)), rng.randint(30, 160)
        names = ("native", *[name for name in FORMATS if name != "native"]) if formats else ("native",)

        def rule() -> Rule:
            span = rng.choice(((0, 0), (20, 0), (40, 0), (0, 150), (10, 400), (0, 1024)))
            select = rng.choice(((0, 0), (1, 0), (7, 0), (20, 0), (40, 0), (0, 100), (5, 300), (0, 1024)))
            return Rule(rng.choice((4, 16)), *span, rng.choice(names), rng.choice(names), *select)

        self.rules = [rule() for _ in range(rng.choice((1, 2, 3)))]
        if not any(each.selects for each in self.rules):
            self.rules[0] = Rule(4, 20, 0, select_alpha=9)
        heads = len(self.rules)
        shape = (self.rows, heads, self.n, DIM)
        self.query = torch.randn(self.rows, heads * GROUP, self.n, DIM, generator=generator, dtype=dtype)
        self.key, self.value = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
        few = rng.choice((3, 40, 30000))  # ties, and none
        self.scores = torch.randint(-few, few, shape[:3], generator=generator).to(torch.int16)


def attended(case: Case, trained: torch.Tensor | None, mask: torch.Tensor | None = None, **given: Any) -> torch.Tensor:
    """What the layer gives of the whole case without a cache, `[rows, n, heads, dim]`."""
    given[CONTEXT] = LayerCall(LayerContext.of(0, case.rules, MIN_WINDOW, None), None, case.scores, trained)
    return attention_forward(MODULE, case.query, case.key, case.value, mask, **given)[0]


class OneQuery:
    """Attention of one query by the words of the definition.

    Args:
        raw: its scores, `[n]`.
        value: `[n, dim]`.
        sink: learned logit, or -inf.
    """

    def __init__(self, raw: torch.Tensor, value: torch.Tensor, sink: torch.Tensor) -> None:
        self.raw, self.value, self.sink = raw, value, sink

    def shares(self, mask: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.raw.masked_fill(~mask, -torch.inf), self.sink[None]]).softmax(-1)[:-1]

    def gained(self, mask: torch.Tensor, j: int) -> torch.Tensor:
        """What the output gains by key j: that with it less that without it, `[dim]`."""
        with_it, without = mask.clone(), mask.clone()
        with_it[j], without[j] = True, False
        outs = [self.shares(seen) @ self.value for seen in (with_it, without)]
        share = self.shares(mask)[j]
        if share > 1 - MUCH:  # of a key that is nearly all there is, no more is said than this
            return share / MUCH * (self.value[j] - outs[0])
        return outs[0] - outs[1]


def expected(case: Case, grad: torch.Tensor, softcap: float, sinks: torch.Tensor) -> torch.Tensor:
    """The gradient in scores in units of 1."""
    found = torch.zeros(case.scores.shape, dtype=torch.float64)
    scores = case.scores.double() / 256
    keys, values = (
        oracle.kept_by_head(side, [getattr(rule, name) for rule in case.rules]).double()
        for side, name in ((case.key, "key_format"), (case.value, "value_format"))
    )
    for row in range(case.rows):
        for head, rule in enumerate(case.rules):
            if not rule.selects:
                continue
            own, value = scores[row, head], values[row, head]
            masks = oracle.visible(rule, case.n, MIN_WINDOW, scores=case.scores[row, head].tolist())
            window = oracle.visible(rule.without_choice(), case.n, MIN_WINDOW)
            raw = case.query[row, head * GROUP : (head + 1) * GROUP].double() @ keys[row, head].T * DIM**-0.5
            raw = torch.tanh(raw / softcap) * softcap if softcap else raw
            for i in range(case.n):
                there = [j for j in range(i) if not window[i, j]]
                kept, out = [j for j in there if masks[i, j]], [j for j in there if not masks[i, j]]
                if not kept or not out:
                    continue
                change = torch.zeros(len(there), dtype=torch.float64)
                for number in range(GROUP):
                    query = head * GROUP + number
                    asking = OneQuery(raw[number, i], value, sinks[query])
                    change += torch.stack([grad[row, i, query] @ asking.gained(masks[i], j) for j in there])
                bound = (own[kept].min() + own[out].max()) / 2
                near = torch.sigmoid((own[there] - bound) / WIDTH)
                steep = near * (1 - near) / WIDTH
                found[row, head, there] += (change - (change * steep).sum() / steep.sum()) * steep
    return found


@pytest.mark.parametrize(
    ("extras", "formats"), [(False, False), (True, False), (False, True)], ids=["plain", "softcap and sinks", "formats"]
)
@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.heavy) for seed in range(4, 8))])
def test_scores_get_what_outputs_gain(seed: int, extras: bool, formats: bool) -> None:
    case = Case(seed, formats, torch.float32 if formats else torch.float64)
    case.n = min(case.n, 90)
    names = ("int4", "int8") if formats else ("native", "native")
    # of some in a window of most, nothing contests a place
    case.rules[0] = Rule(4, 20, 0, *names, select_alpha=(2, 7)[seed % 2])
    case.query, case.key, case.value, case.scores = (
        tensor[:, :, : case.n].contiguous() for tensor in (case.query, case.key, case.value, case.scores)
    )
    generator = torch.Generator().manual_seed(seed)
    sinks = torch.randn(case.query.shape[1], generator=generator, dtype=torch.float64).to(case.query.dtype)
    given: dict[str, Any] = {"softcap": 3.0, "s_aux": sinks} if extras else {}
    trained = (case.scores.double() / 256).requires_grad_()
    out = attended(case, trained, **given)
    plain = attended(case, None, **given)
    assert torch.allclose(out, plain, atol=1e-4) if formats else torch.equal(out, plain)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    (found,) = torch.autograd.grad(out, trained, grad)
    wanted = expected(
        case, grad.double(), given.get("softcap", 0.0), sinks if extras else torch.full_like(sinks, -torch.inf)
    )
    assert case.n < 40 or wanted[:, 0].any()
    assert torch.allclose(found.double(), wanted, rtol=1e-3, atol=1e-4 * max(float(wanted.abs().max()), 1e-3))


def test_other_gradients_are_as_they_were() -> None:
    case = Case(3)
    case.query, case.key, case.value = (each.requires_grad_() for each in (case.query, case.key, case.value))
    asked = (case.query, case.key, case.value)
    trained = (case.scores.double() / 256).requires_grad_()
    ours, plain = (torch.autograd.grad(attended(case, each).square().sum(), asked) for each in (trained, None))
    assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))


def test_padding_is_refused() -> None:
    case = Case(1)
    trained = (case.scores.double() / 256).requires_grad_()
    real = torch.ones(case.rows, case.n, dtype=torch.bool)
    real[:, :3] = False
    with pytest.raises(UnsupportedError, match="without padding"):
        attended(case, trained, mask=real)
