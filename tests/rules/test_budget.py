"""Budgets: what is understood, what is refused with which words, and the bytes they come to."""

from __future__ import annotations

import pytest

from moacompress.core.errors import BudgetError, InfeasibleBudgetError
from moacompress.rules.budget import (
    Budget,
    byte_limits,
    check_feasible,
    format_length,
    parse_bytes,
    parse_length,
    parse_lengths,
    reference_length,
)
from moacompress.rules.model_shape import ModelShape

SHAPE = ModelShape("llama", 2, 4, 2, 16, "float16", (None, 64), "0" * 16)


@pytest.mark.parametrize(
    ("text", "share", "size", "length"),
    [
        ("25%", 0.25, None, None),
        (" 25% ", 0.25, None, None),
        ("0.25", 0.25, None, None),
        ("1", 1.0, None, None),
        ("12.5%@8k", 0.125, None, 8192),
        ("25%@1000", 0.25, None, 1000),
        ("512MiB@32k", None, 512 * 2**20, 32768),
        ("1.5gib@4K", None, 3 * 2**29, 4096),
    ],
)
def test_understood(text: str, share: float | None, size: int | None, length: int | None) -> None:
    assert Budget.parse(text) == Budget(text.strip(), share, size, length)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "outside"),
        ("3", "bare number above 1; did you mean '3%'"),
        ("abc", "is not understood; write '25%'"),
        ("", "the budget is empty; write '25%'"),
        ("-25%", "has a sign"),
        ("1e-1", "is not understood"),
        ("25%@", "names no length after '@'; write one such as '25%@8k'"),
        ("25@8k", "did you mean '25%@8k'?"),
        ("25%8k", "has '8k' after its '%'; did you mean '25%@8k'?"),
        ("512MB@32k", "has the unit 'MB', which is not one of %, KiB, MiB and GiB; did you mean '512MiB@32k'?"),
        ("2g", "has the unit 'g', which is not one of %, KiB, MiB and GiB; did you mean '2GiB@32k'?"),
        ("25 percent", "has the unit 'percent', which is not one of %, KiB, MiB and GiB; write '25%'"),
        ("200%", "is more than the dense model takes, outside (0%, 100%]"),
        ("9" * 400 + "GiB@1k", "is more bytes than any memory has"),
        ("25%@abc", "length 'abc' is not a number of tokens"),
        ("512MiB", "needs the length it holds at, such as '512MiB@32k'"),
        ("0MiB@1k", "is no bytes at all"),
        ("25%,12.5%", "names several plans"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(BudgetError) as error:
        Budget.parse(text)
    assert message in str(error.value)
    assert error.value.exit_code == 2


def test_lengths() -> None:
    assert parse_length("4k") == 4096
    assert parse_lengths("4k,1k,1024, 300") == (300, 1024, 4096)
    assert [format_length(n) for n in (300, 1024, 8192)] == ["300", "1k", "8k"]
    for text in ("", "k", "-1", "1.5k", "1m", "999999999", "99999999k", "1k,,2k", "1k,"):
        with pytest.raises(BudgetError, match="is not a number of tokens"):
            parse_lengths(text)


def test_a_share_holds_at_every_length_and_the_smallest_limit_counts() -> None:
    dense = {n: SHAPE.dense_kv_bytes(n) for n in (512, 1024)}
    assert dense[1024] == 2 * (1024 + 64) * 2 * 16 * 2
    assert byte_limits([Budget.parse("25%")], SHAPE, [1024, 512]) == {512: dense[512] // 4, 1024: dense[1024] // 4}
    both = [Budget.parse("50%"), Budget.parse("25%@1k"), Budget.parse("1MiB@2k")]
    found = byte_limits(both, SHAPE, (1024, 512))
    assert [*found.items()] == [(512, dense[512] // 2), (1024, dense[1024] // 4), (2048, 2**20)]  # the shortest first
    with pytest.raises(BudgetError, match="no budget given"):
        byte_limits([], SHAPE, [512])


def test_a_share_is_what_was_written() -> None:
    """`int(0.29 * bytes)` is one byte, and so one block of the cache, less where the product is whole."""
    lengths = range(16, 4001, 112)
    for percent in range(1, 101):
        limits = Budget.parse(f"{percent}%").limits(SHAPE, lengths)
        assert limits == {n: SHAPE.dense_kv_bytes(n) * percent // 100 for n in lengths}
    thousandths = Budget.parse("33.3%").limits(SHAPE, lengths)
    assert thousandths == {n: SHAPE.dense_kv_bytes(n) * 333 // 1000 for n in lengths}


def test_reference_length_is_the_longest_unless_named() -> None:
    assert reference_length([Budget.parse("25%")], [512, 2048]) == 2048
    assert reference_length([Budget.parse("25%"), Budget.parse("25%@1k")], [512, 2048]) == 1024


def test_an_impossible_budget_says_the_smallest_possible() -> None:
    check_feasible({1024: 100}, {1024: 100}, SHAPE)
    dense = SHAPE.dense_kv_bytes(1024)
    with pytest.raises(InfeasibleBudgetError, match=r"at 1k tokens .* ask for at least 10\.\d%") as error:
        check_feasible({1024: dense // 100}, {1024: dense // 10 + 1}, SHAPE)
    asked = str(error.value).rpartition("at least ")[2].split("%")[0]
    limit = Budget.parse(f"{asked}%").limits(SHAPE, [1024])
    check_feasible(limit, {1024: dense // 10 + 1}, SHAPE)


def test_sizes_of_memory() -> None:
    sizes = {"128M": 2**27, "128 MiB": 2**27, "1.5g": 3 * 2**29, "4kb": 4096, "4096": 4096, "12B": 12}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    for text in ("", "M", "-1M", "1T", "0", "0.1", "1e99"):
        with pytest.raises(BudgetError, match="is not understood; write bytes such as '128MiB'"):
            parse_bytes(text)
