"""What plans cost: work, shares, bits and bytes against counting by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moacompress.rules.candidates import candidate_rules
from moacompress.rules.cost import attention_flops, format_rows, holds_from, kept_bits, kv_shares
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule

SHAPE = ModelShape("llama", 6, 4, 2, 16, "float32", (None,) * 4 + (64, None), "weights")
SHORT = replace(SHAPE, layers=2, native_windows=(None, None))
RULES = candidate_rules(512, (4, 16, 64), 32)


def test_flops_count_what_is_kept() -> None:
    shape, rule, n = SHORT, RULES[5], 200
    plan = Plan.uniform(shape, rule, 32)
    each = 4 * shape.head_dim * shape.heads  # two products, a multiply-add is two
    found = attention_flops(plan, n)
    assert found["decode"] == each * shape.layers * rule.kept(n, 32)
    assert found["prefill"] == each * shape.layers * sum(rule.kept(i, 32) for i in range(1, n + 1))
    assert attention_flops(Plan.full(shape), n)["prefill"] == each * shape.layers * n * (n + 1) // 2


@pytest.mark.parametrize("seed", range(2))
def test_shares_at_many_lengths_are_those_at_each(seed: int) -> None:
    numbers = np.random.default_rng(seed).integers(len(RULES), size=(6, 2))
    plan = Plan(SHAPE, 32, tuple(tuple(RULES[number] for number in row) for row in numbers))
    lengths = np.arange(1, 3000, 37)
    assert kv_shares(plan, lengths).tolist() == [plan.kv_share(int(n)) for n in lengths]
    share = plan.kv_share(2048) * 1.2
    asked = plan.with_notes(budget={"asked": [f"{share:.6f}@2048"]}, provenance={"lengths": [2048]})
    n = 2048
    while n > 16 and plan.kv_share(n - 16) <= float(f"{share:.6f}"):
        n -= 16
    assert holds_from(asked) == n


def test_bits_and_bytes_by_formats() -> None:
    narrow, whole = Rule(4, 64, 0, "int8", "int4"), Rule(4, 0, 1024, "int4", "native")
    plan = Plan(SHORT, 32, ((narrow, whole), (Rule.FULL, narrow)))
    n, dim = 512, SHORT.head_dim
    few, all_of_them = narrow.kept(n, 32), 512
    keys = 2 * few * (8 * dim + 32) + all_of_them * (4 * dim + 32) + all_of_them * 32 * dim
    values = 2 * few * (4 * dim + 32) + 2 * all_of_them * 32 * dim
    kept = 2 * (few + all_of_them) * dim
    assert kept_bits(plan, n) == pytest.approx({"keys": keys / kept, "values": values / kept})
    found = format_rows(plan, n)
    pairs = [(row["key_format"], row["value_format"]) for row in found]
    assert pairs == [("native", "native"), ("int4", "native"), ("int8", "int4")]
    assert [row["kv_heads"] for row in found] == [1, 1, 2]
    assert sum(int(row["kv_bytes"]) for row in found) == plan.kv_bytes(n)
