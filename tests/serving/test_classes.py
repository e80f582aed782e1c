"""KV heads in classes: each once, in blocks of one size, as few bytes as there are for so many classes.

What a class frees is what no rule of it sees, and what it holds is no more than is said.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from moacompress.core.errors import UsageError
from moacompress.models.stored_plan import read_plan
from moacompress.rules.formats import FORMATS
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.windows import BLOCK, Span, block_runs, selected, tokens_left
from moacompress.serving.vllm.classes import kv_classes, kv_heads
from moacompress.serving.vllm.freed_blocks import freed_blocks
from moacompress.serving.vllm.selected_blocks import selected_blocks
from tests.plan_kinds import random_plan

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 2300


def shape(layers: int = 6, kv_heads: int = 3, native: tuple[int | None, ...] | None = None) -> ModelShape:
    """Returns the shape of a model in bfloat16."""
    return ModelShape("llama", layers, kv_heads * 2, kv_heads, 32, "bfloat16", native or (None,) * layers, "")


@pytest.mark.parametrize("seed", range(4))
def test_classes_hold_all_heads(seed):
    rng = random.Random(seed)
    native = rng.choice((None, (64, None, None, 64, None, 300)))
    plan = random_plan(shape(native=native), seed, formats=seed % 2 == 1)
    most, n = rng.choice((3, 5, 18)), rng.choice((100, 2000))
    found = kv_classes(plan, torch.bfloat16, most, n)
    assert len(found.classes) <= most
    heads = [head for one in found.classes for head in one.heads]
    assert sorted((head.layer, head.index) for head in heads) == [(layer, h) for layer in range(6) for h in range(3)]
    for one in found.classes:
        assert len({head.span[-1] for head in one.heads}) == 1
        ends = [(at, at + head.nbytes) for head, at in one.places()]
        assert ends[-1][1] <= found.block_bytes
        assert all(before[1] == after[0] for before, after in pairwise(ends))
    assert found.held_bytes(n) >= plan.kv_bytes(n)


def test_a_class_for_every_head_holds_what_the_plan_says():
    plan = random_plan(shape(), 3)
    found = kv_classes(plan, torch.bfloat16, 18)
    for n in (1, 100, 1000, 5000):
        assert found.held_bytes(n) == plan.kv_bytes(n)


def test_rules_equal_within_classes_hold_what_the_plan_says():
    """As a search with as many classes makes them, where the blocks come out even."""
    rules = (Rule(4, 100, 0), Rule(16, 20, 100), Rule(64, 500, 0))
    plan = Plan(shape(), 16, (rules,) * 6)
    found = kv_classes(plan, torch.bfloat16, 3)
    assert len(found.classes) == 3
    for n in (700, 1000, 5000):
        assert found.held_bytes(n) == plan.kv_bytes(n)


def test_more_classes_hold_less():
    plan = random_plan(shape(layers=12), 5, formats=True)
    sizes = [kv_classes(plan, torch.bfloat16, most, 3000).held_bytes(3000) for most in (1, 2, 4, 8, 18)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] * 0.8


@pytest.mark.parametrize("name", ["gemma3-270m-quarter-8k", "smollm2-135m-quarter-gates", "smollm2-135m-eighth"])
def test_more_classes_than_heads_could_fill_cost_nothing(name):
    plan = read_plan(ROOT / "docs" / "plans" / f"{name}.json")
    few, many = (kv_classes(plan, torch.bfloat16, most, 2048).held_bytes(2048) for most in (18, 400))
    assert many <= few


def test_formats_take_their_bytes():
    plan = Plan.uniform(shape(), replace(Rule.FULL, key_format="int8", value_format="int4"))
    assert sum(head.nbytes for head in kv_heads(plan, torch.bfloat16)) * 10 == plan.kv_bytes(160)


def test_two_sliding_windows_share_no_class():
    plan = Plan.uniform(shape(native=(64, None, None, 64, None, 300)), Rule(4, 20, 0))
    with pytest.raises(UsageError, match="2 classes of KV heads are too few: the model has 3 different"):
        kv_classes(plan, torch.bfloat16, 2)


def gated(seed: int, layers: int = 6) -> Plan:
    """Returns a plan in which most KV heads select."""
    rng = random.Random(seed)

    def rule() -> Rule:
        keys, values = rng.choices([*FORMATS], k=2)
        return Rule(4, rng.choice((0, 40)), 0, keys, values, *rng.choice(((0, 0), (30, 0), (100, 60), (0, 300))))

    rules = tuple(tuple(rule() for _ in range(3)) for _ in range(layers))
    return Plan(shape(layers), 16, rules, gates="0" * 16)


@pytest.mark.parametrize("seed", range(3))
def test_selected_tokens_have_classes_of_their_own(seed):
    plan, n = gated(seed), 1500
    found = kv_classes(plan, torch.bfloat16, random.Random(seed).choice((2, 6, 18)), n)
    assert [one.selected for one in found.classes] == sorted(one.selected for one in found.classes)
    heads = [(layer, h) for layer in range(6) for h in range(3)]
    for of_gates, expected in (
        (False, heads),
        (True, [at for at in heads if plan.rules[at[0]][at[1]].selects]),
    ):
        classes = [one for one in found.classes if one.selected == of_gates]
        assert sorted((head.layer, head.index) for one in classes for head in one.heads) == expected
        assert all(
            (one.units * one.unit_bytes if of_gates else sum(head.nbytes for head in one.heads)) <= found.block_bytes
            for one in classes
        )
    for tokens in (1, 100, n):
        most = found.block_bytes * sum(one.blocks.most_held(tokens, 256) for one in found.classes)
        assert plan.kv_bytes(tokens) <= found.held_bytes(tokens) <= most


def test_a_class_for_each_rule_holds_selected_tokens_as_the_plan_says():
    rules = (Rule(4, 100, 0, select_alpha=100), Rule(16, 20, 100, select_beta_q=200))
    plan = Plan(shape(kv_heads=2), 16, (rules,) * 6, gates="0" * 16)
    found = kv_classes(plan, torch.bfloat16, 4)
    assert [one.selected for one in found.classes] == [False, False, True]
    for n in (700, 1000, 5000):
        assert found.held_bytes(n) == plan.kv_bytes(n)


def test_selected_tokens_need_a_class():
    said = "1 classes of KV heads are too few: the model has 1 different .* gates select"
    with pytest.raises(UsageError, match=said):
        kv_classes(gated(1), torch.bfloat16, 1)


@pytest.mark.parametrize("seed", range(3))
def test_places_of_selected_tokens(seed):
    """There are as many as the next query needs, at every length; each unit is one KV head's, and stays so."""
    plan, per_block, longest = gated(seed, layers=2), 1 + 2 * seed, 1500
    heads = [head for head in kv_heads(plan, torch.bfloat16) if head.rule.selects]
    blocks = selected_blocks(tuple(head.select for head in heads), per_block)
    units = blocks.units(longest)
    assert sorted(unit for some in units for unit in some) == [*range(sum(map(len, units)))]
    assert -(-sum(map(len, units)) // per_block) == blocks.held(longest)  # no more than a row of the block table has
    for some, few in zip(units, blocks.units(1100), strict=True):
        assert some[: len(few)].tolist() == few.tolist() == sorted(few)
    for n in range(1, longest + 1):
        needed = [-(-int(selected(tokens_left(n + 1, Span(*head.span)), *head.select[-2:])) // BLOCK) for head in heads]
        most = max((int(some[count - 1]) + 1 for some, count in zip(units, needed, strict=True) if count), default=0)
        assert most <= sum(needed)
        assert blocks.held(n) == blocks.most_held(n, 99) == -(-sum(needed) // per_block)


def some_spans(rng: random.Random) -> tuple[tuple[int, ...], ...]:
    """Returns spans of a class at random: one native window for all."""
    native = rng.choice((0, 0, 40, 500))
    return tuple(
        (rng.choice((0, 4, 16, 64)), rng.choice((0, 7, 100, 5000)), rng.choice((0, 100, 700, 1024)), 16, native)
        for _ in range(rng.choice((1, 2, 5)))
    )


@pytest.mark.parametrize("seed", range(6))
def test_freed_is_what_no_rule_sees(seed):
    """By the definition of blocks that a rule touches, at every length; and it only grows."""
    spans = some_spans(random.Random(seed))
    freed, before = freed_blocks(spans), set[int]()
    for n in [*range(1, 300), *range(300, LONGEST, 7)]:
        seen = set[int]()
        for span in spans:
            for begin, end in block_runs(n, Span(*span)):
                seen |= set(range(begin, end))
        blocks, now = -(-n // BLOCK), freed.at(n)
        assert [not now.holds(block) for block in range(blocks)] == [block in seen for block in range(blocks)]
        assert now.count(blocks) == blocks - len(seen)
        assert freed.held(n) == len(seen)
        gone = set(range(blocks)) - seen
        assert gone >= before
        before = gone


@pytest.mark.parametrize("seed", range(6))
def test_no_way_to_compute_a_prompt_holds_more(seed):
    rng = random.Random(seed)
    freed = freed_blocks(some_spans(rng))
    for _ in range(50):
        n, in_flight = rng.randint(1, LONGEST), rng.choice((1, 16, 100, 256, 4096))
        most, computed = 0, 0
        while computed < n:
            chunk = min(rng.randint(1, in_flight), n - computed)
            blocks = -(-(computed + chunk) // BLOCK)
            most = max(most, blocks - freed.at(computed + 1).count(blocks))
            computed += chunk
        assert most <= freed.most_held(n, in_flight)
        assert freed.most_held(n, in_flight) >= freed.held(n)


def test_lengths_far_apart_are_the_same_as_near_ones():
    freed = freed_blocks(((4, 20, 300, 16, 0),))
    (_, sinks), (window, _) = block_runs(np.arange(1, 5000), Span(4, 20, 300, 16))
    for n in (4999, 1, 1023, 1024, 1025, 3000):
        assert freed.at(n)[1:] == (sinks[n - 1], max(window[n - 1], sinks[n - 1]))
