"""A plan in few bytes, as trials and stages keep theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.share import Share

if TYPE_CHECKING:
    from moacompress.calibration.profile.store import Profile


def pack(plan: Plan) -> dict[str, Any]:
    """Returns a plan without its notes in few bytes: the distinct rules, each KV head's number among them, and the shares."""
    distinct = sorted({rule for row in plan.rules for rule in row})
    number = {rule: index for index, rule in enumerate(distinct)}
    return {
        "rules": [rule.to_list() for rule in distinct],
        "choice": [[number[rule] for rule in row] for row in plan.rules],
        **({"shares": [share and share.to_dict() for share in plan.shares]} if plan.shares else {}),
    }


def unpack(packed: dict[str, Any], profile: Profile) -> Plan:
    """Returns the plan that `pack` packed, of a search in a profile."""
    distinct: Sequence[Rule] = [Rule.from_list(rule) for rule in packed["rules"]]
    rules = tuple(tuple(distinct[number] for number in row) for row in packed["choice"])
    shares = tuple(share and Share.from_dict(share) for share in packed.get("shares", ()))
    return profile.plan(rules, shares)
