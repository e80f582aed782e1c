"""One token after the other in blocks that freed windows leave: what is attended to is what the definition selects."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from moacompress.kernels.arguments import CacheView, Passing, Scores, SelectedView, as_tensors
from moacompress.kernels.backend import prefill_alone
from moacompress.kernels.cpu import library
from moacompress.kernels.cpu.cpu_backend import CpuBackend
from moacompress.kernels.dispatch import REFERENCE
from moacompress.kernels.kv_parts import KVPart
from moacompress.rules.formats import FORMATS
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.selection import competing_tokens, eviction_schedule
from moacompress.rules.windows import BLOCK
from tests.kernels.conftest import TOLERANCE

TOKENS, WIDTH, GROUP, MIN_WINDOW = 150, 16, 2, 8
ROWS = 2


def passing_of(rules: RuleTable, scores: torch.Tensor) -> Passing:
    """Returns which tokens of a row gates let be attended to, `scores` `[tokens, kv_heads]`, by the definition."""
    first, after = (rules.tokens_left(np.array([n])) for n in (0, len(scores)))
    tokens = competing_tokens(rules, first, after)
    of_tokens = scores.numpy()[tokens.positions, tokens.rows_and_heads[1]].astype(np.int64)
    found = eviction_schedule(tokens, rules, of_tokens).ever_selected
    return Passing(*map(torch.from_numpy, (found.begins, -1 - found.positions, found.admitted, found.evicted)))


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


def nothing(memory: torch.Tensor) -> torch.Tensor:
    """Fills memory with what no number or no scale is."""
    return memory.fill_(0xFF) if memory.dtype == torch.uint8 else memory.fill_(torch.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(6))
def test_steps_select_as_the_definition(seed: int, dtype: torch.dtype, isa: Callable[[str], None]) -> None:
    isa(library.ISAS[seed % len(library.ISAS)])
    rng = random.Random(seed)
    torch.manual_seed(seed)
    drawn = []
    for alpha, beta_q in ((9, 0), rng.choice(((0, 200), (40, 0))), (0, 0)):
        keys, values = rng.choices([*FORMATS], k=2)
        rule = Rule(rng.choice((0, 4, 16)), rng.choice((0, 20)), rng.choice((0, 100)), keys, values)
        drawn.append(replace(rule, select_alpha=alpha, select_beta_q=beta_q))
    rules = RuleTable.of(drawn, MIN_WINDOW)
    heads, pool = len(drawn) * GROUP, Pool(rules, dtype)
    query, key, value = (
        torch.randn(ROWS, TOKENS, count, WIDTH, dtype=dtype) for count in (heads, len(drawn), len(drawn))
    )
    of_tokens = torch.randint(-20, 20, (ROWS, TOKENS, len(drawn)), dtype=torch.int16)
    scores = Scores(WIDTH**-0.5, rng.choice((0.0, 5.0)), rng.choice((None, torch.randn(heads))))
    found = []
    for token in range(TOKENS):
        pool.put(token, key[:, token], value[:, token], of_tokens[:, token])
        found.append(
            CpuBackend().decode_selecting(
                query[:, token],
                cache=CacheView(pool.keys, pool.values, pool.table, WIDTH),
                selected=SelectedView(pool.selected, pool.scores),
                lengths=torch.full((ROWS,), token + 1),
                rules=as_tensors(rules),
                scores=scores,
            )
        )
        pool.forget(token + 1)
    for row in range(ROWS):
        expected = prefill_alone(
            REFERENCE,
            *(part[row : row + 1].transpose(1, 2).float() for part in (query, key, value)),
            rules=as_tensors(rules),
            scores=scores,
            passing=passing_of(rules, of_tokens[row]),
        )
        error = (torch.stack(found, 1)[row].float() - expected[0].transpose(0, 1)).abs().max()
        assert error < TOLERANCE[dtype], row


def test_what_does_not_fit_is_refused() -> None:
    rules = RuleTable.of([Rule(4, 0, 0, select_alpha=20)], MIN_WINDOW)
    pool = Pool(rules, torch.float32)

    def step(table: torch.Tensor, scores: list[torch.Tensor], tokens: int, columns: torch.Tensor) -> torch.Tensor:
        return CpuBackend().decode_selecting(
            torch.randn(ROWS, GROUP, WIDTH),
            cache=CacheView(pool.keys, pool.values, pool.table, WIDTH),
            selected=SelectedView(table, scores),
            lengths=torch.full((ROWS,), tokens),
            rules=RuleTable(columns),
            scores=Scores(1.0, 0.0, None),
        )

    columns = torch.from_numpy(rules.columns)
    step(pool.selected, pool.scores, 13, columns)
    with pytest.raises(RuntimeError, match="has no id of the pool"):
        step(torch.full_like(pool.selected, -1), pool.scores, 13, columns)
    with pytest.raises(RuntimeError, match="has no id of the pool"):
        step(pool.selected[:, :, :0].contiguous(), pool.scores, 13, columns)
    with pytest.raises(RuntimeError, match="scores of"):
        step(pool.selected, [pool.scores[0][1:]], 13, columns)
    wrong = columns.clone()
    wrong[-2] = -1
    with pytest.raises(RuntimeError, match="selects -1 tokens"):
        step(pool.selected, pool.scores, 13, wrong)
