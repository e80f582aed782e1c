"""What sharing a plan may ask for, and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from moacompress.core.errors import PlanError
from moacompress.rules.cost import format_rows, kept_bits
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.share import Share, served, with_shared_rules

SHAPE = ModelShape("llama", 4, 4, 2, 16, "bfloat16", (None, 64, None, None), "2-0123456789abcdef")
SHORT, LONG = Rule(4, 32, 0, "int8", "int4"), Rule(4, 64, 512, "int8", "int8")


def plan(share: Share | None, rules: tuple[Rule, Rule] = (SHORT, LONG), own: tuple[Rule, Rule] = (LONG, SHORT)) -> Plan:
    return Plan(SHAPE, 32, (rules, rules, own, (Rule.FULL,) * 2), shares=(None, None, share, None))


def test_a_copy_takes_its_values_alone_for_as_long_as_its_anchor_keeps() -> None:
    own = (replace(LONG, value_format="int4"), replace(SHORT, value_format="native"))
    shared, without = plan(Share(0, (1, 0)), own=own), plan(None, own=own)
    kept = [int(rule.slots(1000, 32)) for rule in (LONG, SHORT)]
    values = [16 // 2 + 4, 16 * 2]
    assert shared.head_bytes(1000)[2] == [tokens * size for tokens, size in zip(kept, values, strict=True)]
    keys = sum(tokens * (16 + 4) for tokens in kept)
    assert shared.kv_bytes(1000) == without.kv_bytes(1000) - keys
    assert sum(int(row["kv_bytes"]) for row in format_rows(shared, 1000)) == shared.kv_bytes(1000)
    assert kept_bits(shared, 1000)["keys"] != kept_bits(without, 1000)["keys"]
    assert kept_bits(shared, 1000)["values"] == kept_bits(without, 1000)["values"]


def test_json_and_keys() -> None:
    shared = plan(Share(0, (1, 0)))
    assert Plan.from_dict(shared.to_dict()) == shared
    assert shared.to_dict()["layers"][2]["share"] == {"anchor": 0, "kind": "copy", "head_map": [1, 0]}
    assert shared.key() != plan(None).key()
    assert Plan(SHAPE, 32, plan(None).rules, shares=(None,) * 4) == plan(None)
    assert plan(None).diff(shared) == ["layer 2: own attention -> copy of layer 0 by heads 1, 0"]


def test_who_is_served() -> None:
    shares = (None, Share(0, (1, 1)), Share(0, (0, 1)))
    assert served(shares, 0, 2) == (((2, 0),), ((1, 0), (1, 1), (2, 1)))
    assert served(shares, 1, 2) == ((), ())


def test_rules_of_copies_are_made_to_fit() -> None:
    shares = (None, None, Share(0, (1, 0)), None)
    free = Plan(SHAPE, 32, ((SHORT, LONG),) * 4).rules
    fitting = with_shared_rules(free, shares)
    assert fitting[2] == (replace(LONG, value_format="int4"), replace(SHORT, value_format="int8"))
    assert fitting[:2] + fitting[3:] == free[:2] + free[3:]
    Plan(SHAPE, 32, fitting, shares=shares)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: plan(Share(2, (0, 1))), "names the anchor 2; an anchor is an earlier layer, 0 to 1"),
        (lambda: plan(Share(-1, (0, 1))), "names the anchor -1"),
        (lambda: plan(Share(1, (0, 1))), "names the anchor 1, whose own sliding window is 64, not None"),
        (lambda: plan(Share(0, (0, 2))), r"must have 2 KV heads of 0 to 1, not \(0, 2\)"),
        (lambda: plan(Share(0, (0,))), r"must have 2 KV heads of 0 to 1, not \(0,\)"),
        (
            lambda: plan(Share(0, (0, 1))),
            r"layer 2 KV head 0 copies attention under 4\|32 .* a copy has its anchor's span",
        ),
        (
            lambda: plan(Share(0, (1, 0)), own=(replace(LONG, key_format="int4"), SHORT)),
            "layer 2 KV head 0 has keys in int4, its anchor's are in int8",
        ),
        (
            lambda: Plan(SHAPE, 32, ((LONG, LONG),) * 4, shares=(None, None, Share(0, (0, 1)), Share(2, (0, 1)))),
            "names the anchor 2, which shares attention itself",
        ),
        (lambda: Plan(SHAPE, 32, ((LONG, LONG),) * 4, shares=(None, Share(0, (0, 1)))), "2 entries for 4 layers"),
    ],
)
def test_sharing_that_no_model_can_run(make: Callable[[], Plan], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        make()


@pytest.mark.parametrize(
    ("share", "words"),
    [
        ([0], "share of layer 2 must be an object"),
        ({"anchor": 0, "kind": "copy"}, "share of layer 2 lacks the key 'head_map'"),
        ({"anchor": 0, "kind": "copy", "head_map": [0, 1], "x": 1}, "share of layer 2 has the unknown key 'x'"),
        ({"anchor": 0.5, "kind": "copy", "head_map": [0, 1]}, "anchor of share of layer 2 must be a whole number"),
        ({"anchor": 0, "kind": 3, "head_map": [0, 1]}, "kind of share of layer 2 must be a text"),
        (
            {"anchor": 0, "kind": "keys", "head_map": [0, 1]},
            "kind of share of layer 2 is 'keys', .* search again with `moacompress search --share`",
        ),
        ({"anchor": 0, "kind": "copy", "head_map": [0, 1, 1]}, "head_map of share of layer 2 has 3 entries, not 2"),
        (
            {"anchor": 0, "kind": "copy", "head_map": [0, 10**9]},
            "head_map of share of layer 2 KV head 1 is 1000000000, outside",
        ),
    ],
)
def test_a_plan_that_is_not_trusted(share: object, words: str) -> None:
    data = plan(None).to_dict()
    data["layers"][2]["share"] = share
    with pytest.raises(PlanError, match=words):
        Plan.from_dict(data)


def test_a_plan_does_not_share_and_select() -> None:
    selecting, other = (replace(LONG, select_alpha=16),) * 2, (SHORT, SHORT)
    with pytest.raises(PlanError, match="layers that share attention and KV heads that keep tokens by their score"):
        Plan(SHAPE, 32, (selecting, other, selecting, other), shares=(None, None, Share(0, (0, 1)), None))
