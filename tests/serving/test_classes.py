"""KV heads in classes: each once, in blocks of one size, and as few bytes as there are for so many classes."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from moacompress.core.errors import UsageError
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.serving.vllm.classes import kv_classes, kv_heads
from tests.plan_kinds import random_plan


def shape(layers: int = 6, kv_heads: int = 3, native: tuple[int | None, ...] | None = None) -> ModelShape:
    """Returns the shape of a model in bfloat16."""
    return ModelShape("llama", layers, kv_heads * 2, kv_heads, 32, "bfloat16", native or (None,) * layers, "")


@pytest.mark.parametrize("seed", range(12))
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


def test_formats_take_their_bytes():
    plan = Plan.uniform(shape(), replace(Rule.FULL, key_format="int8", value_format="int4"))
    assert sum(head.nbytes for head in kv_heads(plan, torch.bfloat16)) * 10 == plan.kv_bytes(160)


def test_two_sliding_windows_share_no_class():
    plan = Plan.uniform(shape(native=(64, None, None, 64, None, 300)), Rule(4, 20, 0))
    with pytest.raises(UsageError, match="2 classes of KV heads are too few: the model has 3 different"):
        kv_classes(plan, torch.bfloat16, 2)
