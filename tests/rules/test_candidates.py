"""What KV heads may choose from: rules that select, beside those of `candidate_rules`."""

from __future__ import annotations

import itertools

import pytest

from moacompress.rules.candidates import candidate_windows, gated_rules


@pytest.mark.parametrize("longest", [96, 512, 2048, 32768])
def test_rules_that_select_have_windows_that_are_on_offer(longest: int) -> None:
    found = gated_rules(longest, (16, 4), 16)
    assert len(set(found)) == len(found)
    assert {(rule.alpha, rule.beta_q) for rule in found} <= set(candidate_windows(longest, 16))
    assert all(rule.selects and rule.sink == 4 for rule in found)


def test_gates_may_choose_little_and_most_of_what_has_left() -> None:
    """A quarter of the bytes has room for most tokens in codes, and a thirty-second for next to none."""
    kept = {rule: int(rule.kept(2048, 16)) for rule in gated_rules(2048, (4,), 16)}
    narrow = sorted(count for rule, count in kept.items() if (rule.alpha, rule.beta_q) == (16, 0))
    assert narrow[0] == 4 + 16 + 16
    assert narrow[-1] > 0.75 * 2028
    assert all(later <= 2 * earlier for earlier, later in itertools.pairwise(narrow))
    assert max(kept.values()) < 2048
