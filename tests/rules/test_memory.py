"""KV memory of requests, counted by hand."""

from __future__ import annotations

from moacompress.rules.memory import kv_memory
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule

GQA = ModelShape("llama", 4, 8, 2, 64, "bfloat16", (None,) * 4, "")
SLIDING = ModelShape("gemma3_text", 4, 4, 1, 64, "bfloat16", (512, 512, 512, None), "")
TOKEN = 2 * 64 * 2
"""Bytes of a token's key and value of one KV head: 64 numbers of 2 bytes each."""


def test_only_kv_heads_count() -> None:
    found = kv_memory(GQA, [1024, 4096], [1, 8], weights=1 << 20, available=(1 << 20) + 5 * 4 * 2 * 1024 * TOKEN + 1)
    assert (found["dtype"], found["weights"]) == ("bfloat16", 1 << 20)
    short, long = found["rows"]
    dense = 4 * 2 * 1024 * TOKEN  # four layers of two KV heads, not of eight heads
    assert short["kv_bytes"]["1"]["dense"] == dense
    assert short["kv_bytes"]["8"]["dense"] == 8 * dense
    assert long["kv_bytes"]["1"]["dense"] == 4 * dense
    assert [short["kv_bytes"]["1"][name] for name in ("50%", "25%", "12.5%")] == [dense // 2, dense // 4, dense // 8]
    assert (short["requests"]["dense"], short["requests"]["50%"], long["requests"]["dense"]) == (5, 10, 1)


def test_quantized_caches_take_their_codes_and_scales() -> None:
    sizes = kv_memory(GQA, [1024], [1], weights=0, available=0)["rows"][0]["kv_bytes"]["1"]
    for name in ("int8", "int4"):
        token = Rule.FULL.in_formats(name, name).token_bytes(64, 64, "bfloat16")
        assert sizes[name] == 4 * 2 * 1024 * token
    assert sizes["dense"] / 4 < sizes["int4"] < sizes["dense"] / 2 < sizes["int8"] < sizes["dense"]


def test_native_windows_hold_no_more_than_they_see() -> None:
    (row,) = kv_memory(SLIDING, [32768], [1], weights=None, available=0)["rows"]
    windows = sum(Rule.FULL.slots(32768, 32, native) for native in SLIDING.native_windows)
    assert 32768 + 3 * 512 <= windows <= 32768 + 3 * (512 + 16)
    assert row["kv_bytes"]["1"]["dense"] == windows * TOKEN
    assert set(row["requests"].values()) == {None}  # nothing is known of the weights


def test_a_plan_stands_for_the_budgets() -> None:
    plan = Plan.uniform(GQA, Rule(4, 252, 0))
    (row,) = kv_memory(GQA, [1024], [2], weights=0, available=10 * plan.kv_bytes(1024), plan=plan)["rows"]
    assert list(row["requests"]) == ["dense", "int8", "int4", "plan"]
    assert row["kv_bytes"]["2"]["plan"] == 2 * plan.kv_bytes(1024)
    assert row["requests"]["plan"] == 10
