"""A table of rules says what each rule says by itself; its JSON form and its formats."""

from __future__ import annotations

import numpy as np
import pytest

from moacompress.rules.candidates import candidate_rules
from moacompress.rules.formats import CODED, FORMATS, NATIVE
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import COLUMNS, RuleTable
from moacompress.rules.windows import BETA_ONE, RUNS, block_runs, visible_intervals

RULES = candidate_rules(4096, (4, 16, 64), 32)
LENGTHS = np.array([1, 15, 16, 17, 63, 64, 65, 300, 4096])


@pytest.mark.parametrize("native", [None, 24, 1000])
def test_it_says_what_each_rule_says(native: int | None) -> None:
    table = RuleTable.of(RULES, 32, native)
    assert table.columns.shape == (len(COLUMNS), len(RULES))
    assert table.columns.flags.c_contiguous
    assert table.rules == RULES
    assert len(table) == len(RULES)
    bounds = [np.broadcast_arrays(*interval) for interval in table.visible_intervals(LENGTHS)]
    runs = table.block_runs(LENGTHS)
    assert runs.shape == (RUNS, 2, len(LENGTHS), len(RULES))
    for number, rule in enumerate(RULES):
        for at, n in enumerate(LENGTHS.tolist()):
            span = rule.span(32, native)
            expected = visible_intervals(n, span)
            assert [(int(a[at, number]), int(b[at, number])) for a, b in (bounds[0],)] == [expected[0]]
            assert bounds[1][0][at, number] == expected[1][0]
            assert runs[:, :, at, number].tolist() == [list(run) for run in block_runs(n, span)]
            assert table.slots(LENGTHS)[at, number] == rule.slots(n, 32, native)


def test_groups_are_rules_that_keep_the_same() -> None:
    rules = (Rule.FULL, Rule(4, 100, 0), Rule(64, 9, BETA_ONE), Rule(4, 100, 0), Rule(4, 100, 1))
    groups = RuleTable.of(rules, 16, 50).groups()
    assert [numbers for _, numbers in groups] == [(0, 2), (1, 3), (4,)]
    assert [tuple(span) for span, _ in groups] == [(4, 0, BETA_ONE, 16, 50), (4, 100, 0, 16, 50), (4, 100, 1, 16, 50)]


def test_bytes_of_a_token_come_from_the_formats() -> None:
    assert Rule(4, 100, 0).token_bytes(64, 32, "bfloat16") == (64 + 32) * 2
    assert RuleTable.of(RULES[:3], 32).token_bytes(64, 64, "float32").tolist() == [512] * 3
    assert sorted(format.code for format in FORMATS.values()) == [*range(len(FORMATS))]
    assert FORMATS[NATIVE].vector_bytes(80, "float16") == 160
    assert [FORMATS[name].vector_bytes(65, "bfloat16") for name in CODED] == [72, 64, 40]
    assert Rule(4, 100, 0, "int8", "int4").token_bytes(64, 32, "bfloat16") == 68 + 20


def test_the_json_form_of_a_rule() -> None:
    assert Rule(4, 16, 0, "int8", "native").to_list() == [4, 16, 0, "int8", "native"]
    gated = Rule(4, 16, 0, select_alpha=5), Rule(4, 16, 0, "int4", "int8", 0, 64)
    assert gated[1].to_list() == [4, 16, 0, 0, 64, "int4", "int8"]
    for rule in (*RULES, Rule(4, 16, 0, "int4", "int8"), *gated):
        assert rule.to_list()[:3] == [rule.sink, rule.alpha, rule.beta_q]
        assert Rule.from_list(rule.to_list()) == rule


@pytest.mark.parametrize(
    "data",
    [[4, 16], [4, 16, 0, "native"], [4, 16, 0, "int3", "native"], [4, 16, 0, 7, "int8"], [4, 16, 0, 7], ["a", 1, 2]],
)
def test_what_is_no_rule(data: list[object]) -> None:
    with pytest.raises(ValueError, match="no rule|invalid literal"):
        Rule.from_list(data)
