"""Random plans for tests, one function a kind."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from moacompress.models.source import model_shape
from moacompress.rules.formats import FORMATS
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.key_centres import Centres, as_centres
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import MIN_WINDOWS, SINKS, Rule
from moacompress.rules.share import Share, with_shared_rules


def random_plan(shape: ModelShape, seed: int = 0, full_share: float = 0.15, formats: bool = False) -> Plan:
    """Returns a sparse plan; with `formats` any of each."""
    rng = random.Random(seed)

    def span() -> Rule:
        if rng.random() < full_share:
            return Rule.FULL
        return Rule(rng.choice(SINKS), rng.choice([0, 7, 20, 40, 100]), rng.choice([0, 0, 100, 300, 700]))

    def rule() -> Rule:
        if not formats:
            return span()
        return replace(span(), key_format=rng.choice([*FORMATS]), value_format=rng.choice([*FORMATS]))

    rules = tuple(tuple(rule() for _ in range(shape.kv_heads)) for _ in range(shape.layers))
    return Plan(shape, rng.choice(MIN_WINDOWS), rules)


def gated_plan(model: Any, seed: int) -> Plan:
    """Returns a plan whose rules select, with random gates."""
    shape, rng = model_shape(model), random.Random(seed)
    draw = np.random.default_rng(seed)
    gates = GateWeights(
        draw.standard_normal((shape.layers, shape.kv_heads, model.config.hidden_size)).astype(np.float32),
        draw.standard_normal((shape.layers, shape.kv_heads)).astype(np.float32),
    )

    def rule(window: int | None) -> Rule:
        select = rng.choice(((9, 0), (5, 0), (12, 0), (0, 200)))
        return Rule(
            4, rng.choice((0, 20)), rng.choice((0, 100)), "native", "native", *(select if window is None else ())
        )

    rules = tuple(tuple(rule(window) for _ in range(shape.kv_heads)) for window in shape.native_windows)
    return Plan(shape, 16, rules, gates=gates.fingerprint, gate_weights=gates)


def shares_of(shape: ModelShape, seed: int) -> tuple[Share | None, ...]:
    """Returns shares at random: about half of the layers, and at least one, share with an earlier one like them."""
    draw = random.Random(seed)
    shares: list[Share | None] = []
    for layer, native in enumerate(shape.native_windows):
        anchors = [
            earlier for earlier in range(layer) if shares[earlier] is None and shape.native_windows[earlier] == native
        ]
        last = layer == shape.layers - 1 and not any(shares)
        if not anchors or not (last or draw.random() < 0.6):
            shares.append(None)
            continue
        heads = tuple(draw.randrange(shape.kv_heads) for _ in range(shape.kv_heads))
        shares.append(Share(draw.choice(anchors), heads))
    return tuple(shares)


def with_shares(plan: Plan, shares: tuple[Share | None, ...]) -> Plan:
    """Returns a plan whose layers share."""
    return replace(plan, rules=with_shared_rules(plan.rules, shares), shares=shares)


def full(model: Any) -> Plan:
    """Everything, in the model's own dtype."""
    return Plan.full(model_shape(model))


def windows(model: Any) -> Plan:
    """A sink and a window for most KV heads."""
    return random_plan(model_shape(model), seed=3)


def formats(model: Any) -> Plan:
    """Windows, and keys and values of every format."""
    return random_plan(model_shape(model), seed=9, formats=True)


def gates(model: Any) -> Plan:
    """Windows, and tokens that gates select."""
    return gated_plan(model, 5)


def shares(model: Any) -> Plan:
    """Windows, and layers that share attention."""
    plan = random_plan(model_shape(model), seed=5)
    return with_shares(plan, shares_of(plan.model, 1))


def centres(model: Any) -> Plan:
    """Formats, and keys that lie less centres of norm 100."""
    plan = formats(model)
    return replace(plan, centres=random_centres(plan.model, 100.0))


def random_centres(shape: ModelShape, norm: float, seed: int = 0) -> Centres:
    """Returns centres of a norm, of all KV heads."""
    drawn = np.random.default_rng(seed).standard_normal((shape.layers, shape.kv_heads, shape.head_dim))
    return as_centres(norm * drawn / np.linalg.norm(drawn, axis=-1, keepdims=True))


KINDS: dict[str, Callable[[Any], Plan]] = {kind.__name__: kind for kind in (full, windows, formats, gates)}
"""Kinds of plan, by name: each makes one for a model."""
