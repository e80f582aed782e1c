"""How the queries and keys of an anchor reach the layers that share them, within one forward.

They go from layer to layer in a dictionary that the decoder's hook puts among the keywords of the layers, from scratch in every
forward: no module and no cache keeps them. A layer that is computed again for its backward pass is given the same dictionary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from moacompress.core.errors import UnsupportedError
from moacompress.rules.share import Share

SHARED_KEYS = "moacompress_shared_keys"
"""Keyword under which what anchors hand on reaches the attention."""


class SharedKeys(NamedTuple):
    """What an anchor attends with.

    Attributes:
        query: `[batch, heads, tokens, head_dim]`.
        key: `[batch, kv_heads, tokens, head_dim]`.
        sink_logits: learned logit of each query head, `[heads]`, or None.
    """

    query: torch.Tensor
    key: torch.Tensor
    sink_logits: torch.Tensor | None

    def taken(self, share: Share) -> SharedKeys:
        """Returns what a reuse layer attends with, given what it takes."""
        kv_heads, heads = self.key.shape[1], self.query.shape[1]
        key = self.key[:, list(share.head_map)]
        group = heads // kv_heads
        picked = [of * group + member for of in share.head_map for member in range(group)]
        logits = None if self.sink_logits is None else self.sink_logits[picked]
        return SharedKeys(self.query[:, picked], key, logits)


def taken(shared_keys: Any, layer: int, share: Share) -> SharedKeys:
    """Returns what a reuse layer attends with.

    Args:
        shared_keys: what anchors have shared in this forward, by layer; None where the model has lost it.
        layer: its index.
        share: what it takes from its anchor.

    Raises:
        UnsupportedError: the anchor has shared no keys.
    """
    if shared_keys is None or share.anchor not in shared_keys:
        raise UnsupportedError(
            f"layer {layer} shares the attention of layer {share.anchor}, which has shared no keys in this forward: run the "
            "decoder whole, with all its layers in order"
        )
    found: SharedKeys = shared_keys[share.anchor]
    return found.taken(share)
