"""Attention sharing: a reuse layer attends with the queries and keys of an earlier layer, its anchor, and its own values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from moacompress.core.errors import PlanError
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.rule import Rule

COPY = "copy"
"""What the JSON of a plan calls it: the attention probabilities are the anchor's."""


@dataclass(frozen=True)
class Share:
    """What a reuse layer takes from its anchor.

    Attributes:
        anchor: index of the anchor, an earlier layer that shares nothing itself.
        head_map: for each KV head, the anchor's KV head whose keys it reads; its query heads attend as those of that head do,
            in their order.
    """

    anchor: int
    head_map: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return {"anchor": self.anchor, "kind": COPY, "head_map": list(self.head_map)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Share:
        """Reads what `to_dict` returned."""
        return Share(data["anchor"], tuple(data["head_map"]))

    def __str__(self) -> str:
        return f"{COPY} of layer {self.anchor} by heads {', '.join(map(str, self.head_map))}"


LayerShares = tuple[Share | None, ...]


def reuse_layers_of(shares: LayerShares, anchor: int) -> list[int]:
    """Returns the layers that share the attention of one, ascending."""
    return [layer for layer, share in enumerate(shares) if share is not None and share.anchor == anchor]


def served(shares: LayerShares, anchor: int, kv_heads: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Returns for each KV head of a layer whose values are kept beside its own: layer and KV head of each."""
    reuse_layers = [(layer, share) for layer in reuse_layers_of(shares, anchor) if (share := shares[layer]) is not None]
    return tuple(
        tuple((layer, head) for layer, share in reuse_layers for head, of in enumerate(share.head_map) if of == own)
        for own in range(kv_heads)
    )


def value_sets_of(shares: LayerShares, layer: int) -> tuple[int, ...]:
    """Returns of each KV head of a layer that shares which of the values beside the anchor's own are its; see `served`."""
    share = shares[layer]
    assert share is not None
    beside = served(shares, share.anchor, len(share.head_map))
    return tuple(beside[of].index((layer, head)) for head, of in enumerate(share.head_map))


def with_shared_rules(rules: Sequence[Sequence[Rule]], shares: LayerShares) -> tuple[tuple[Rule, ...], ...]:
    """Returns `rules[layer][kv_head]` with those of reuse layers made what they have.

    That is the anchor's span and key format, and the own value format.
    """
    out = [tuple(row) for row in rules]
    for layer, share in enumerate(shares):
        if share is not None:
            anchor = rules[share.anchor]
            out[layer] = tuple(
                replace(anchor[of], value_format=rule.value_format)
                for rule, of in zip(out[layer], share.head_map, strict=True)
            )
    return tuple(out)


def check_shares(shape: ModelShape, rules: Sequence[Sequence[Rule]], shares: LayerShares) -> None:
    """Refuses sharing that no model can run.

    Raises:
        PlanError: naming the layer, and what is wrong.
    """
    if shares and len(shares) != shape.layers:
        raise PlanError(f"shares has {len(shares)} entries for {shape.layers} layers")
    for layer, share in enumerate(shares):
        if share is None:
            continue
        where = f"share of layer {layer}"
        if not 0 <= share.anchor < layer:
            raise PlanError(f"{where} names the anchor {share.anchor}; an anchor is an earlier layer, 0 to {layer - 1}")
        if shares[share.anchor] is not None:
            raise PlanError(
                f"{where} names the anchor {share.anchor}, which shares attention itself; name the layer that it shares with"
            )
        if len(share.head_map) != shape.kv_heads or not all(0 <= of < shape.kv_heads for of in share.head_map):
            raise PlanError(
                f"head_map of {where} must have {shape.kv_heads} KV heads of 0 to {shape.kv_heads - 1}, not {share.head_map}"
            )
        own, its = shape.native_windows[layer], shape.native_windows[share.anchor]
        if own != its:
            raise PlanError(
                f"{where} names the anchor {share.anchor}, whose own sliding window is {its}, not {own}: layers of two kinds "
                "see and rotate differently and cannot share"
            )
        for head, of in enumerate(share.head_map):
            _check_head(f"layer {layer} KV head {head}", rules[layer][head], rules[share.anchor][of])


def _check_head(where: str, rule: Rule, anchor: Rule) -> None:
    if rule.key_format != anchor.key_format:
        raise PlanError(
            f"{where} has keys in {rule.key_format}, its anchor's are in {anchor.key_format}; they are the same keys"
        )
    spans = [one.to_list()[:3] for one in (rule, anchor)]
    if spans[0] != spans[1] and not (rule.sees_all and anchor.sees_all):
        raise PlanError(
            f"{where} copies attention under {anchor} and has the rule {rule}; a copy has its anchor's span"
        )
