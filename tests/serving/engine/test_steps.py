"""Attention over vLLM's blocks: in whatever steps tokens come, it is that of all at once, and the same tokens are selected."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moacompress.kernels.arguments import Scores, as_tensors
from moacompress.kernels.backend import prefill_alone
from moacompress.kernels.cpu.cpu_backend import CpuBackend
from moacompress.kernels.dispatch import REFERENCE
from moacompress.rules.formats import FORMATS
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from tests.kernels.test_selecting import transient_of
from tests.plan_kinds import random_plan

HEADS, KV_HEADS, WIDTH, LAYERS = 6, 3, 32, 2


class Blocks:
    """vLLM's part: memory for the classes of a plan, and blocks for rows, in random order."""

    def __init__(self, plan: Plan, dtype: torch.dtype, rng: random.Random) -> None:
        from moacompress.serving.vllm.classes import kv_classes
        from moacompress.serving.vllm.selected_blocks import SelectedBlocks

        classes = kv_classes(plan, dtype, rng.choice((2, 6)), 200)
        memory = torch.full((400, 1, 16, classes.block_bytes // 16), 255, dtype=torch.uint8)
        self.classes = [
            SimpleNamespace(
                heads=one,
                kv_cache=memory,
                layer_name=f"class {index}",
                units=one.blocks.units(400) if isinstance(one.blocks, SelectedBlocks) else [],
            )
            for index, one in enumerate(classes.classes)
        ]
        self.free = rng.sample(range(400), 400)
        self.tables: list[list[list[int]]] = []

    def grow(self, row: int, tokens: int) -> None:
        """Gives a row blocks for so many tokens, and takes back what none of its queries from there on sees."""
        while len(self.tables) <= row:
            self.tables.append([[] for _ in self.classes])
        for one, table in zip(self.classes, self.tables[row], strict=True):
            wanted = one.heads.blocks.held(tokens) if one.heads.selected else -(-tokens // 16)
            while len(table) < wanted:
                table.append(self.free.pop())

    def shrink(self, row: int, tokens: int) -> None:
        """Frees what is not seen after so many tokens, fills it with NaN, and has others use it."""
        for one, table in zip(self.classes, self.tables[row], strict=True):
            if one.heads.selected:
                continue
            freed = one.heads.blocks.at(tokens + 1)
            for index, block in enumerate(table):
                if freed.holds(index) and block not in self.free:
                    one.kv_cache[block] = 255
                    self.free.insert(0, block)

    def metadata(self, steps: list[tuple[int, int, int]]) -> dict[str, object]:
        """Returns what vLLM says of a step: of each row its number, tokens before and new ones."""
        from moacompress.serving.vllm.class_layers import ClassMetadata

        starts = torch.tensor([0, *(new for *_, new in steps)]).cumsum(0)
        lengths = torch.tensor([past + new for _, past, new in steps], dtype=torch.int32)
        found, width = dict[str, object](), 64  # as vLLM's, of which few are in use
        for index, one in enumerate(self.classes):
            tables = [self.tables[row][index] for row, *_ in steps]
            slots = [
                0 if one.heads.selected else table[at // 16] * 16 + at % 16
                for table, (_, past, new) in zip(tables, steps, strict=True)
                for at in range(past, past + new)
            ]
            padded = torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32)
            found[one.layer_name] = ClassMetadata(starts, lengths, padded, torch.tensor(slots))
        return found


def in_steps(
    blocks: Blocks, layers: dict[str, Any], drawn: list[list[list[torch.Tensor]]], rng: random.Random, monkeypatch: Any
) -> list[list[torch.Tensor]]:
    """Returns attention of rows, computed in chunks, single tokens and beside each other, as vLLM's scheduler may choose.

    `drawn` has of each layer and row its queries, keys, values, and the tokens' scores where a gate selects.
    """
    from moacompress.serving.vllm import attention

    counts = [len(row[0]) for row in drawn[0]]
    found = [[torch.full_like(row[0], torch.nan) for row in rows] for rows in drawn]
    done = [0] * len(counts)
    while any(at < count for at, count in zip(done, counts, strict=True)):
        rows = [row for row, count in enumerate(counts) if done[row] < count and rng.random() < 0.7]
        steps = [(row, done[row], min(rng.choice((1, 1, 1, 5, 40, 130)), counts[row] - done[row])) for row in rows]
        if not steps:
            continue
        for row, past, new in steps:
            blocks.grow(row, past + new)
        context = SimpleNamespace(attn_metadata=blocks.metadata(steps), no_compile_layers=layers)
        monkeypatch.setattr(attention, "get_forward_context", lambda context=context: context)
        for index, (layer_name, rows_of) in enumerate(zip(layers, drawn, strict=True)):
            parts = range(len(rows_of[0]))
            given = [torch.cat([rows_of[row][part][past : past + new] for row, past, new in steps]) for part in parts]
            out = torch.empty_like(given[0])
            query, key, value, *of_gate = given
            attention.attend(query, key, value, of_gate[0] if of_gate else None, out, layer_name)
            for (row, past, new), part in zip(steps, out.split([new for *_, new in steps]), strict=True):
                found[index][row][past : past + new] = part
        for row, past, new in steps:
            done[row] = past + new
            blocks.shrink(row, past + new)
    return found


GROWTH = ((9, 0), (5, 0), (40, 0), (0, 200), (0, 0))


def gated_rules(rng: random.Random) -> tuple[Rule, ...]:
    """Returns rules of a layer, some of which select."""
    drawn = []
    for _ in range(KV_HEADS):
        keys, values = rng.choices([*FORMATS], k=2)
        rule = Rule(rng.choice((4, 16)), rng.choice((0, 20)), rng.choice((0, 100)), keys, values)
        alpha, beta_q = rng.choice(GROWTH)
        drawn.append(replace(rule, select_alpha=alpha, select_beta_q=beta_q))
    drawn[rng.randrange(KV_HEADS)] = Rule(4, 0, 0, select_alpha=20, select_beta_q=50)
    return tuple(drawn)


@pytest.mark.parametrize("gated", [False, True], ids=["", "gates"])
@pytest.mark.parametrize("seed", range(6))
def test_steps_are_as_all_at_once(seed, gated, monkeypatch):
    """In every format, over memory that is freed and used again; scores of gates have many equals.

    Also by a backend that cannot let tokens compete in the call in which they are attended to.
    """
    capabilities = replace(CpuBackend.capabilities, decode_selecting=seed != 5)
    monkeypatch.setattr(CpuBackend, "capabilities", capabilities)
    rng, dtype = random.Random(seed), (torch.float32, torch.bfloat16)[seed % 2]
    torch.manual_seed(seed)
    native, name = None if gated else rng.choice((None, 40)), str(dtype).removeprefix("torch.")
    shape = ModelShape("llama", LAYERS, HEADS, KV_HEADS, WIDTH, name, (native, None), "")
    if gated:
        plan = Plan(shape, 16, tuple(gated_rules(rng) for _ in range(LAYERS)), gates="0" * 16)
    else:
        plan = random_plan(shape, seed, formats=True)
    blocks = Blocks(plan, dtype, rng)
    assert {one.heads.selected for one in blocks.classes} == ({False, True} if gated else {False})
    scores = Scores(WIDTH**-0.5, rng.choice((0.0, 5.0)), rng.choice((None, torch.randn(HEADS))))
    layers = {
        f"model.layers.{index}": SimpleNamespace(
            plan_view=None,
            plan_classes=blocks.classes,
            plan_table=as_tensors(RuleTable.of(plan.rules[index], plan.min_window, window)),
            plan_scores=scores,
            head_size_v=WIDTH,
        )
        for index, window in enumerate(shape.native_windows)
    }

    def tokens(count: int) -> list[torch.Tensor]:
        vectors = [torch.randn(count, heads, WIDTH, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        return [*vectors, *[torch.randint(-20, 20, (count, KV_HEADS), dtype=torch.int16)][: int(gated)]]

    counts = [rng.randint(1, 400) for _ in range(3)]
    drawn = [[tokens(count) for count in counts] for _ in layers]
    found = in_steps(blocks, layers, drawn, rng, monkeypatch)
    for index, (layer, rows_of) in enumerate(zip(layers.values(), drawn, strict=True)):
        for row, (query, key, value, *of_gate) in enumerate(rows_of):
            parts, rules = [part.transpose(0, 1)[None].float() for part in (query, key, value)], layer.plan_table
            transient = transient_of(RuleTable(rules.columns.numpy()), of_gate[0]) if gated else None
            (expected,) = prefill_alone(REFERENCE, *parts, rules=rules, scores=scores, transient=transient)
            error = (found[index][row].float() - expected.transpose(0, 1)).abs().max()
            assert error < (2e-5 if dtype == torch.float32 else 3e-2), (index, row)
