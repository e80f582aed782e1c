"""One token after the other in blocks that freed windows leave: what is attended to is what the definition selects."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moacompress.core.errors import UnsupportedError
from moacompress.kernels.arguments import CacheView, Scores, SelectedView, TransientTokens, as_tensors
from moacompress.kernels.backend import Backend, prefill_alone
from moacompress.kernels.cpu import library
from moacompress.kernels.cpu.cpu_backend import CpuBackend
from moacompress.kernels.dispatch import REFERENCE
from moacompress.kernels.kv_parts import KVPart
from moacompress.kernels.reference.transient import merged
from moacompress.rules.formats import FORMATS
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.selection import competing_tokens, eviction_schedule
from moacompress.rules.windows import BLOCK
from tests import gpu
from tests.kernels.conftest import TOLERANCE

TOKENS, WIDTH, GROUP, MIN_WINDOW = 150, 16, 2, 8
ROWS = 2


def transient_of(rules: RuleTable, scores: torch.Tensor) -> TransientTokens:
    """Returns which tokens of a row gates let be attended to, `scores` `[tokens, kv_heads]`, by the definition."""
    first, after = (rules.tokens_left(np.array([n])) for n in (0, len(scores)))
    tokens = competing_tokens(rules, first, after)
    of_tokens = scores.numpy()[tokens.positions, tokens.rows_and_heads[1]].astype(np.int64)
    found = eviction_schedule(tokens, rules, of_tokens).ever_selected
    return TransientTokens(*map(torch.from_numpy, (found.begins, -1 - found.positions, found.admitted, found.evicted)))


class Pool:
    """Blocks of the KV heads, those of windows first; each KV head has as many for what it selects, and NaN lies in all."""

    def __init__(self, rules: RuleTable, dtype: torch.dtype) -> None:
        self.rules, self.width = rules, -(-TOKENS // BLOCK)
        self.blocks = ROWS * self.width
        parts = [*zip(*rules.format_codes.tolist(), strict=True)]
        self.key_parts = [KVPart(key, WIDTH, dtype) for key, _ in parts]
        self.value_parts = [KVPart(value, WIDTH, dtype, True) for _, value in parts]
        self.keys, self.values = (
            [nothing(part.new(2 * self.blocks, torch.device("cpu"))) for part in of]
            for of in (self.key_parts, self.value_parts)
        )
        self.scores = [
            torch.zeros(2 * self.blocks, 2 * BLOCK if one else 0, dtype=torch.uint8) for one in rules.selecting.tolist()
        ]
        at = torch.arange(ROWS * self.width, dtype=torch.int32).view(ROWS, 1, self.width)
        first = torch.arange(len(rules), dtype=torch.int32)[:, None] * 2 * self.blocks
        self.table = at + first
        self.selected = self.table + self.blocks

    def put(self, position: int, key: torch.Tensor, value: torch.Tensor, scores: torch.Tensor) -> None:
        """Writes a token of all rows; the scores, int16 `[rows, kv_heads]`."""
        slots = torch.arange(ROWS) * self.width * BLOCK + position
        for head in range(len(self.rules)):
            self.key_parts[head].write(self.keys[head], slots, key[:, head])
            self.value_parts[head].write(self.values[head], slots, value[:, head])
            if self.rules.selecting[head]:
                self.scores[head].view(torch.int16)[slots // BLOCK, slots % BLOCK] = scores[:, head]

    def forget(self, tokens: int) -> None:
        """Puts NaN into blocks of windows that no query sees from `tokens` + 1 on."""
        runs = self.rules.block_runs(np.array([tokens + 1]))[:, :, 0]
        for head in range(len(self.rules)):
            held = {block for run in runs for block in range(int(run[0][head]), int(run[1][head]))}
            gone = [block for block in range(tokens // BLOCK) if block not in held]
            for row in range(ROWS):
                for block in gone:
                    nothing(self.keys[head][row * self.width + block])
                    nothing(self.values[head][row * self.width + block])

    def decoded(self, backend: Backend, query: torch.Tensor, tokens: int, scores: Scores, **other: Any) -> torch.Tensor:
        """Attends in rows of so many tokens, over what is selected too; `other` views or rules take the place of its own."""
        given: dict[str, Any] = {
            "cache": CacheView(self.keys, self.values, self.table, WIDTH),
            "selected": SelectedView(self.selected, self.scores),
            "lengths": torch.full((ROWS,), tokens),
            "rules": as_tensors(self.rules),
        }
        return backend.decode_selecting(query, scores=scores, **(given | other))

    def copied(self) -> Pool:
        """The same with memory of its own."""
        other = copy.copy(self)
        for name in ("keys", "values", "scores"):
            setattr(other, name, [segment.clone() for segment in getattr(self, name)])
        return other


def drawn(rng: random.Random, *counts: tuple[int, int]) -> RuleTable:
    """Returns rules of three KV heads, of which the last selects nothing, and the second one of `counts`."""
    found = []
    for alpha, beta_q in ((9, 0), rng.choice(counts), (0, 0)):
        keys, values = rng.choices([*FORMATS], k=2)
        rule = Rule(rng.choice((0, 4, 16)), rng.choice((0, 20)), rng.choice((0, 100)), keys, values)
        found.append(replace(rule, select_alpha=alpha, select_beta_q=beta_q))
    return RuleTable.of(found, MIN_WINDOW)


def nothing(memory: torch.Tensor) -> torch.Tensor:
    """Fills memory with what no number or no scale is."""
    return memory.fill_(0xFF) if memory.dtype == torch.uint8 else memory.fill_(torch.nan)


@pytest.mark.parametrize("seed", range(6))
def test_steps_select_as_the_definition(seed: int, isa: Callable[[str], None]) -> None:
    isa(library.ISAS[seed % len(library.ISAS)])
    rng, dtype = random.Random(seed), (torch.float32, torch.bfloat16)[seed % 2]
    torch.manual_seed(seed)
    rules = drawn(rng, (0, 200), (40, 0))
    kv_heads, heads, pool = len(rules), len(rules) * GROUP, Pool(rules, dtype)
    query, key, value = (torch.randn(ROWS, TOKENS, count, WIDTH, dtype=dtype) for count in (heads, kv_heads, kv_heads))
    of_tokens = torch.randint(-20, 20, (ROWS, TOKENS, kv_heads), dtype=torch.int16)
    scores = Scores(WIDTH**-0.5, rng.choice((0.0, 5.0)), rng.choice((None, torch.randn(heads))))
    found = []
    for token in range(TOKENS):
        pool.put(token, key[:, token], value[:, token], of_tokens[:, token])
        found.append(pool.decoded(CpuBackend(), query[:, token], token + 1, scores))
        pool.forget(token + 1)
    for row in range(ROWS):
        expected = prefill_alone(
            REFERENCE,
            *(part[row : row + 1].transpose(1, 2).float() for part in (query, key, value)),
            rules=as_tensors(rules),
            scores=scores,
            transient=transient_of(rules, of_tokens[row]),
        )
        error = (torch.stack(found, 1)[row].float() - expected[0].transpose(0, 1)).abs().max()
        assert error < TOLERANCE[dtype], row


@pytest.mark.parametrize("name", gpu.PLACES)
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.heavy) for seed in range(2, 8))])
def test_triton_selects_to_the_bit(
    seed: int, name: str, use_backend: Callable[[str], Backend], kernels_cannot_run: Callable[[str | None], None]
) -> None:
    """Where the compiled kernels have selected for a while, a step by Triton is theirs, and writes the same bytes."""
    if library.load().isa is None:
        kernels_cannot_run(library.load().reason)
    rng, dtype = random.Random(seed), (torch.float32, torch.bfloat16)[seed % 2]
    torch.manual_seed(seed)
    rules, few = drawn(rng, (0, 200), (40, 0), (1, 1000)), rng.choice((2, 20, 30000))
    kv_heads, heads, pool = len(rules), len(rules) * GROUP, Pool(rules, dtype)
    scores = Scores(WIDTH**-0.5, rng.choice((0.0, 5.0)), rng.choice((None, torch.randn(heads))))
    triton, watched = use_backend(name), {*rng.sample(range(8, TOKENS), 4)}
    changed = 0
    for token in range(TOKENS):
        key, value = (torch.randn(ROWS, kv_heads, WIDTH, dtype=dtype) for _ in "kv")
        pool.put(token, key, value, torch.randint(-few, few, (ROWS, kv_heads), dtype=torch.int16))
        query, before, other = torch.randn(ROWS, heads, WIDTH, dtype=dtype), pool.copied(), pool.copied()
        found = pool.decoded(CpuBackend(), query, token + 1, scores)
        if token in watched:
            assert (found - other.decoded(triton, query, token + 1, scores)).abs().max() < TOLERANCE[dtype]
            for memory in ("keys", "values", "scores"):
                for three in zip(*(getattr(own, memory) for own in (pool, other, before)), strict=True):
                    of_cpu, of_triton, old = (part.view(torch.uint8) for part in three)
                    assert torch.equal(of_cpu, of_triton)
                    changed += not torch.equal(of_cpu, old)
        pool.forget(token + 1)
    assert changed


@pytest.mark.parametrize("name", ["reference", "cpu", *gpu.PLACES])
def test_tokens_are_moved_with_their_scores(name: str, use_backend: Callable[[str], Backend]) -> None:
    backend = use_backend(name)
    formats = (("int8", "int4"), ("native", "int8"), ("int8", "int4"))
    rules = RuleTable.of([Rule(4, 0, 0, keys, values, 9) for keys, values in formats], MIN_WINDOW)
    pool = Pool(rules, torch.bfloat16)
    for token in range(40):
        key, value = (torch.randn(ROWS, len(rules), WIDTH, dtype=torch.bfloat16) for _ in "kv")
        pool.put(token, key, value, torch.randint(-99, 99, (ROWS, len(rules)), dtype=torch.int16))
    heads = torch.tensor([0, 1, 2, 2, 0, 1])
    slots, to = torch.tensor([3, 17, 39, 0, 20, 2]), torch.tensor([5, 1, 30, 7, 16, 0])
    first = heads * 2 * pool.blocks * BLOCK
    expected = pool.copied()
    for head, source, target in zip(heads.tolist(), slots, to + pool.blocks * BLOCK, strict=True):
        for part, memory in ((expected.key_parts, expected.keys), (expected.value_parts, expected.values)):
            part[head].move(memory[head], source[None], memory[head], target[None])
        of_head = expected.scores[head].view(torch.int16).view(-1)
        of_head[target] = of_head[source]
    parts, held = [*zip(pool.key_parts, pool.value_parts, strict=True)], (pool.keys, pool.values, pool.scores)
    backend.move_selected(parts, *held, heads=heads, slots=first + slots, to=first + pool.blocks * BLOCK + to)
    for kind in ("keys", "values", "scores"):
        for found, wanted in zip(getattr(pool, kind), getattr(expected, kind), strict=True):
            assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize(
    ("name", "message", "change"),
    [
        *((name, "has no id of the pool", lambda ids, scores: (ids * 0 - 1, scores)) for name in ("cpu", "triton")),
        *((name, "has no id of the pool", lambda ids, scores: (ids[..., :0], scores)) for name in ("cpu", "triton")),
        ("cpu", "scores of", lambda table, scores: (table, [scores[0][1:]])),
        ("triton", "has no scores", lambda table, scores: (table, [scores[0][:, :0]])),
        ("cpu", "selects -1 tokens", None),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str, message: str, change: Any, use_backend: Callable[[str], Backend]
) -> None:
    backend, rules = use_backend(name), RuleTable.of([Rule(4, 0, 0, select_alpha=20)], MIN_WINDOW)
    pool, zeros, other = Pool(rules, torch.float32), torch.zeros(ROWS, 1, WIDTH), as_tensors(rules)
    pool.put(12, zeros, zeros, torch.zeros(ROWS, 1, dtype=torch.int16))
    query, selected = torch.randn(ROWS, GROUP, WIDTH), SelectedView(pool.selected, pool.scores)
    pool.decoded(backend, query, 13, Scores(1.0))
    if change is None:
        other = RuleTable(other.columns.clone())
        other.columns[-2] = -1
    else:
        table, scores = change(*selected)
        selected = SelectedView(table.contiguous(), scores)
    with pytest.raises((RuntimeError, UnsupportedError), match=message):
        pool.decoded(backend, query, 13, Scores(1.0), selected=selected, rules=other)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", [1, 2], ids=["key", "value"])
def test_a_selected_token_that_is_not_finite_reaches_those_who_see_it(
    part: int, number: float, isa: Callable[[str], None]
) -> None:
    """All of a chunk's selected tokens are multiplied together, with queries from before they were there too."""
    isa(library.ISAS[0])
    rules = RuleTable.of([Rule(4, 16, 0, select_alpha=64)], 16)
    torch.manual_seed(0)
    given = [torch.randn(1, count, 80, WIDTH) for count in (GROUP, 1, 1)]
    given[part][0, 0, 40, 0] = number
    query, key, value = (tensor.requires_grad_() for tensor in given)
    rest: dict[str, Any] = {"rules": as_tensors(rules), "scores": Scores(0.3)}
    rest["transient"] = transient_of(rules, torch.zeros(80, 1, dtype=torch.int16))
    out = prefill_alone(REFERENCE, query, key, value, **rest)[0]
    assert out[:, :40].isfinite().all()
    assert not out[:, 60:].isfinite().all()
    out[:, :40].sum().backward()
    assert query.grad is not None
    assert query.grad[:, :, :40].isfinite().all()
    with torch.no_grad():
        other = prefill_alone(CpuBackend(), query, key, value, **rest)[0]
    assert torch.equal(other.isfinite(), out.isfinite())


def test_scores_of_minus_infinity_have_no_weight_beside_others() -> None:
    nothing, one = (torch.full((2, 4), torch.nan), torch.full((2,), -torch.inf)), (torch.ones(2, 4), torch.zeros(2))
    for both in ((nothing, one), (one, nothing)):
        assert merged(*both)[0].eq(1).all()
