"""Classes of KV heads: those of one class see the same tokens and hold them in the same formats.

A server that frees memory for several KV heads at once frees only what none of them needs any more. Within a class that is all
that a plan evicts; across classes it is less.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule

RuleClass: TypeAlias = tuple[Rule, int | None]
"""A rule, and the sliding window in tokens that its layer has of its own; None where it has none."""


def rule_class(rule: Rule, native_window: int | None) -> RuleClass:
    """Returns the class of a KV head in a layer with this sliding window of its own.

    In a layer with a window of its own a gate selects nothing, and counts for nothing.
    """
    if native_window is not None:
        rule = rule.without_choice()
    if rule.sees_all:
        rule = replace(rule, sink=Rule.FULL.sink, alpha=Rule.FULL.alpha, beta_q=Rule.FULL.beta_q)
    return rule, native_window


def classes_of(plan: Plan) -> dict[RuleClass, list[tuple[int, int]]]:
    """Returns the classes of a plan, each with its KV heads as `(layer, kv_head)`, in the order of their first one."""
    found: dict[RuleClass, list[tuple[int, int]]] = {}
    for layer, (row, native) in enumerate(zip(plan.rules, plan.model.native_windows, strict=True)):
        for head, rule in enumerate(row):
            found.setdefault(rule_class(rule, native), []).append((layer, head))
    return found
