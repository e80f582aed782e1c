"""How the queries and keys of an anchor reach the layers that share them, within one forward.

They go from layer to layer in a dictionary that the decoder's hook puts among the keywords of the layers, anew in every
forward: no module and no cache keeps them. A layer that is computed again for its backward pass is given the same dictionary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from moacompress.core.errors import UnsupportedError
from moacompress.rules.share import Share

HANDED = "moacompress_handed"
"""Keyword under which what anchors hand on reaches the attention."""


class Handed(NamedTuple):
    """What an anchor attends with.

    Attributes:
        query: `[batch, heads, tokens, head_dim]`.
        key: `[batch, kv_heads, tokens, head_dim]`.
        sink_logits: learned logit of each query head, `[heads]`, or None.
    """

    query: torch.Tensor
    key: torch.Tensor
    sink_logits: torch.Tensor | None

    def taken(self, share: Share) -> Handed:
        """Returns what a reuse layer attends with, given what it takes."""
        kv_heads, heads = self.key.shape[1], self.query.shape[1]
        key = self.key[:, list(share.head_map)]
        group = heads // kv_heads
        picked = [of * group + member for of in share.head_map for member in range(group)]
        logits = None if self.sink_logits is None else self.sink_logits[picked]
        return Handed(self.query[:, picked], key, logits)


def taken(handed: Any, layer: int, share: Share) -> Handed:
    """Returns what a reuse layer attends with.

    Args:
        handed: what anchors have handed on in this forward, by layer; None where the model has lost it.
        layer: its index.
        share: what it takes from its anchor.

    Raises:
        UnsupportedError: the anchor has handed nothing on.
    """
    if handed is None or share.anchor not in handed:
        raise UnsupportedError(
            f"layer {layer} shares the attention of layer {share.anchor}, which has handed nothing on in this forward: run the "
            "decoder whole, with all its layers in order"
        )
    found: Handed = handed[share.anchor]
    return found.taken(share)
