"""How the queries and keys of an anchor reach the layers that share them, within one forward.

They go from layer to layer in an `AnchorKeys` that the decoder's hook puts among the keywords of the layers, from scratch in
every forward: no module and no cache keeps them. A layer that is computed again for its backward pass is given the same one.
"""

from __future__ import annotations

from functools import lru_cache
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
        sink_logits: learned logits, as of `Scores`.
    """

    query: torch.Tensor
    key: torch.Tensor
    sink_logits: torch.Tensor | None

    def taken(self, share: Share) -> SharedKeys:
        """Returns what a reuse layer attends with, given what it takes."""
        kv_heads, heads = self.key.shape[1], self.query.shape[1]
        of_keys, of_queries = (_places(share.head_map, group, self.key.device) for group in (1, heads // kv_heads))
        logits = self.sink_logits
        if logits is not None:
            logits = logits.index_select(int(logits.ndim > 1), of_queries)
        return SharedKeys(self.query.index_select(1, of_queries), self.key.index_select(1, of_keys), logits)


class AnchorKeys:
    """What anchors have shared in a forward.

    No dictionary: of those accelerate gives every layer a copy, where it moves what goes through a model from device to device.

    Attributes:
        by_layer: by the anchor's layer.
        with_gradients: whether the forward is one that gradients are taken of.
    """

    def __init__(self, with_gradients: bool) -> None:
        self.by_layer: dict[int, SharedKeys] = {}
        self.with_gradients = with_gradients

    def put(self, layer: int, shared: SharedKeys) -> None:
        """Takes what an anchor shares.

        Raises:
            UnsupportedError: it would have no gradients, in a forward that has some.
        """
        if self.with_gradients and not torch.is_grad_enabled():
            raise UnsupportedError(
                f"layer {layer} shares its attention and runs without gradients first, as by reentrant gradient checkpointing, "
                "which loses those of the layers that reuse it; enable it with "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        self.by_layer[layer] = shared


def taken(shared_keys: Any, layer: int, share: Share) -> SharedKeys:
    """Returns what a reuse layer attends with.

    `shared_keys`: the `AnchorKeys` of this forward; None where the model has lost it.

    Raises:
        UnsupportedError: the anchor has shared no keys.
    """
    if shared_keys is None or share.anchor not in shared_keys.by_layer:
        raise UnsupportedError(
            f"layer {layer} shares the attention of layer {share.anchor}, which has shared no keys in this forward: run the "
            "decoder whole, with all its layers in order"
        )
    found: SharedKeys = shared_keys.by_layer[share.anchor]
    return found.taken(share)


def _places(head_map: tuple[int, ...], group: int, device: torch.device) -> torch.Tensor:
    """Returns which heads of an anchor those of a reuse layer attend as, int64 `[kv_heads * group]`.

    They stay on the device from the first time on: a decode step copies nothing to it.

    `head_map`: see `Share`.
    """
    if torch.compiler.is_compiling():
        return _new_places(head_map, group, device)
    return _kept_places(head_map, group, device)


def _new_places(head_map: tuple[int, ...], group: int, device: torch.device) -> torch.Tensor:
    picked = [of * group + member for of in head_map for member in range(group)]
    with torch.inference_mode(False):  # gradients may need it
        return torch.tensor(picked, dtype=torch.int64, device=device)


_kept_places = lru_cache(maxsize=1024)(_new_places)
