"""The worst share of a plan's bytes, against counting every length."""

from __future__ import annotations

import numpy as np
import pytest

from moacompress.rules import worst_share
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.worst_share import WorstShare

SHAPES = {
    "plain": ModelShape("llama", 3, 4, 2, 16, "float32", (None,) * 3, "0" * 16),
    "sliding": ModelShape("gemma3", 3, 4, 2, 16, "float32", (None, 96, None), "0" * 16),
}


def random_rule(rng: np.random.Generator, gates: bool) -> Rule:
    if rng.random() < 0.2:
        return Rule.FULL
    beta = int(rng.choice([0, 100, 517, 1000]))
    formats = rng.choice(["native", "int8", "int4"], 2).tolist()
    chosen = (int(rng.integers(0, 60)), int(rng.choice([0, 33, 200]))) if gates and rng.random() < 0.5 else (0, 0)
    return Rule(
        int(rng.choice([4, 16, 64])), int(rng.integers(0, 200)), beta, formats[0], formats[1], chosen[0], chosen[1]
    )


def test_what_holds_at_profiled_lengths_need_not_hold_between_them() -> None:
    rows = ((Rule(4, 100, 100),) * 2, (Rule.FULL, Rule(16, 32, 0)), (Rule(4, 32, 0),) * 2)
    plan = Plan(SHAPES["plain"], 32, rows).with_notes(provenance={"lengths": [512, 1024]})
    found = WorstShare.of(plan)
    assert found.share > max(plan.kv_share(512), plan.kv_share(1024))
    assert found.length % 16 == 1  # the first token of a block


def made(name: str, seed: int, gates: bool) -> Plan:
    rng, shape = np.random.default_rng(seed), SHAPES[name]
    rows = tuple(tuple(random_rule(rng, gates and not native) for _ in range(2)) for native in shape.native_windows)
    return Plan(shape, 32, rows).with_notes(provenance={"lengths": [300, 700]})


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("gates", [False, True])
def test_it_is_the_most_at_any_length(name: str, gates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worst_share, "LEAST_END", 1500)
    monkeypatch.setattr(worst_share, "AT_ONCE", 999)  # parts do not matter
    for seed in range(2):
        plan = made(name, seed, gates)
        found = WorstShare.of(plan)
        shares = {n: plan.kv_share(n) for n in range(300, 1501)}
        assert (found.begin, found.end) == (300, 1500)
        assert (found.share, found.length) == (max(shares.values()), max(shares, key=shares.__getitem__))
        far = [plan.kv_share(n) for n in (*range(1501, 3000), *range(3000, 60_000, 997), 10**6 + 1, 10**8 + 17)]
        assert max(far) <= found.beyond


def test_beyond_is_close(monkeypatch: pytest.MonkeyPatch) -> None:
    growing = made("plain", 0, False)
    rows = ((Rule(4, 0, 256),) * 2,) * 3
    plan = Plan(growing.model, 32, rows).with_notes(provenance={"lengths": [300, 700]})
    found = WorstShare.of(plan)
    assert found.share > 0.3 > found.beyond >= plan.kv_share(10**8) == pytest.approx(0.25, abs=1e-5)
    assert found.beyond < 0.252
    assert str(found).startswith("at most ")
    assert f"(at {found.length:,})" in str(found)
    full = WorstShare.of(Plan.full(growing.model))
    assert (full.share, full.beyond) == (1.0, 1.0)


def test_a_share_that_grows_is_bounded_by_where_it_ends() -> None:
    # no window at short lengths beyond the smallest, most of the tokens at long ones
    shape = SHAPES["plain"]
    rows = ((Rule(4, 0, 512, "int8", "int8"),) * 2, (Rule(4, 10_000, 900),) * 2, (Rule.FULL,) * 2)
    plan = Plan(shape, 32, rows).with_notes(provenance={"lengths": [20_000]})
    found = WorstShare.of(plan)
    assert found.beyond >= plan.kv_share(10**8)
    assert "from 20000 tokens on" in str(found)
