"""KV bytes: one KV head's by hand, and sums over layers, candidates and many lengths against it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moacompress.rules.candidates import candidate_rules
from moacompress.rules.kv_bytes import (
    candidate_kv_bytes,
    dense_kv_bytes,
    head_kv_bytes,
    kv_bytes,
)
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.share import LayerShares, Share, with_shared_rules

SHAPE = ModelShape("llama", 6, 4, 2, 16, "float32", (None, None, None, None, 64, None), "weights")
RULES = candidate_rules(512, (4, 16, 64), 32)
SHARES: LayerShares = (None, Share(0, (1, 0)), None, Share(2, (0, 0)), None, None)
LENGTHS = (1, 63, 64, 65, 511, 1000)


def test_a_kv_head_takes_the_blocks_that_it_touches() -> None:
    rule = Rule(4, 40, 0, "int8", "int4")
    blocks = 1 + 3  # the sinks', and of 1000 tokens the last 40 lie in blocks 60 to 62
    assert head_kv_bytes(SHAPE, rule, 32, None, 1000) == 16 * blocks * ((16 + 4) + (8 + 4))
    assert head_kv_bytes(SHAPE, rule, 32, None, 1000, reuses=True) == 16 * blocks * (8 + 4)
    assert head_kv_bytes(SHAPE, Rule.FULL, 32, None, 1000) == 16 * 63 * 2 * 16 * 4
    assert head_kv_bytes(SHAPE, Rule.FULL, 32, 64, 1000) == 16 * 5 * 2 * 16 * 4


def test_candidates_of_layers_that_reuse_keys_agree_with_plans() -> None:
    """Of others: `test_limits`."""
    reused = candidate_kv_bytes(SHAPE, RULES, 32, LENGTHS, SHARES)
    for number in (0, 1, 7, len(RULES) - 1):
        shared = replace(Plan.uniform(SHAPE, RULES[number], 32), shares=SHARES)
        assert reused[..., number].tolist() == [shared.head_bytes(n) for n in LENGTHS]


@pytest.mark.parametrize("shares", [(), SHARES])
def test_many_lengths_at_once(shares: LayerShares) -> None:
    rng = np.random.default_rng(0)
    rows = [[RULES[number] for number in rng.integers(len(RULES), size=2)] for _ in range(SHAPE.layers)]
    plan = Plan(SHAPE, 32, with_shared_rules(rows, shares), shares=shares)
    lengths = np.array(LENGTHS, np.int64)
    found, dense = kv_bytes(SHAPE, plan.rules, 32, lengths, shares), dense_kv_bytes(SHAPE, lengths)
    assert found.dtype == dense.dtype == np.int64
    assert found.tolist() == [plan.kv_bytes(n) for n in LENGTHS]
    assert found.tolist() == [sum(map(sum, plan.head_bytes(n))) for n in LENGTHS]
    assert dense.tolist() == [Plan.full(SHAPE).kv_bytes(n) for n in LENGTHS]
