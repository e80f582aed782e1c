from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from moacompress.rules.candidates import candidate_rules
from moacompress.rules.cost import attention_flops, format_rows, holds_from, kept_bits, kv_shares
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule


class Offer(NamedTuple):
    """What a profile would say of a model and its candidate rules."""

    shape: ModelShape
    rules: tuple[Rule, ...]
    min_window: int = 32


Profiles = Callable[..., Offer]


@pytest.fixture
def profiles() -> Profiles:
    def offer(layers: int = 6) -> Offer:
        natives = tuple(64 if layer % 5 == 4 else None for layer in range(layers))
        shape = ModelShape("llama", layers, 4, 2, 16, "float32", natives, "weights")
        return Offer(shape, candidate_rules(512, (4, 16, 64), 32))

    return offer


def test_flops_count_what_is_kept(profiles: Profiles) -> None:
    profile = profiles(layers=2)
    shape, n = profile.shape, 200
    rule = profile.rules[5]
    plan = Plan.uniform(shape, rule, profile.min_window)
    each = 4 * shape.head_dim * shape.heads  # two products, a multiply-add is two
    found = attention_flops(plan, n)
    assert found["decode"] == each * shape.layers * rule.kept(n, profile.min_window)
    assert found["prefill"] == each * shape.layers * sum(rule.kept(i, profile.min_window) for i in range(1, n + 1))
    assert attention_flops(Plan.full(shape), n)["prefill"] == each * shape.layers * n * (n + 1) // 2


@pytest.mark.parametrize("seed", range(4))
def test_shares_at_many_lengths_are_those_at_each(profiles: Profiles, seed: int) -> None:
    offer, rng = profiles(), np.random.default_rng(seed)
    rules = [tuple(offer.rules[i] for i in rng.integers(len(offer.rules), size=offer.shape.kv_heads)) for _ in range(6)]
    plan = Plan(offer.shape, offer.min_window, tuple(rules))
    lengths = np.arange(1, 3000, 37)
    assert kv_shares(plan, lengths).tolist() == [plan.kv_share(int(n)) for n in lengths]
    share = plan.kv_share(2048) * 1.2
    asked = plan.with_notes(budget={"asked": [f"{share:.6f}@2048"]}, provenance={"lengths": [2048]})
    n = 2048
    while n > 16 and plan.kv_share(n - 16) <= float(f"{share:.6f}"):
        n -= 16
    assert holds_from(asked) == n


def test_bits_and_bytes_by_formats(profiles: Profiles) -> None:
    offer = profiles(layers=2)
    narrow, whole = Rule(4, 64, 0, "int8", "int4"), Rule(4, 0, 1024, "int4", "native")
    plan = Plan(offer.shape, 32, ((narrow, whole), (Rule.FULL, narrow)))
    n, dim = 512, offer.shape.head_dim
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
