"""A cache that holds so many tokens of each KV head and no more, and exchanges them one by one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moacompress.evaluation.eviction.attention import WholeCache
from moacompress.evaluation.eviction.baseline import StreamBaseline


@dataclass
class _Slots:
    """The kept tokens of one layer, by slot; those that hold nothing have the position -1.

    Attributes:
        key: `[kv_heads, slots, head_dim]`.
        value: `[kv_heads, slots, value_dim]`.
        positions: `[kv_heads, slots]`.
        received: attention so far, likewise.
        read: how many tokens came in.
    """

    key: Tensor
    value: Tensor
    positions: Tensor
    received: Tensor
    read: int = 0

    def put(self, heads: Tensor, slot: Tensor | int, key: Tensor, value: Tensor) -> None:
        """Puts the next token into a slot of each KV head; what was there is gone.

        Args:
            heads: all KV heads, `[kv_heads]`.
            slot: of each, or one of all.
            key: `[kv_heads, head_dim]`.
            value: `[kv_heads, value_dim]`.
        """
        self.key[heads, slot], self.value[heads, slot] = key, value
        self.positions[heads, slot], self.received[heads, slot] = self.read, 0.0
        self.read += 1

    def attended(self, query: Tensor) -> Tensor:
        """Returns what one token gets, `[kv_heads, group, value_dim]`, and notes the attention that it gives.

        Args:
            query: `[kv_heads, group, head_dim]`, times the factor on the scores.
        """
        logits = (query @ self.key.transpose(1, 2)).masked_fill((self.positions < 0)[:, None], -torch.inf)
        weights = logits.softmax(-1)
        self.received += weights.mean(1)
        return weights @ self.value


class StreamCache(WholeCache):
    """Runs a `StreamBaseline`; transformers' part of it only counts tokens. One row.

    Args:
        baseline: what evicts.
        room: how many tokens each KV head keeps, `[layers, kv_heads]`, at least one.
    """

    def __init__(self, baseline: StreamBaseline, room: Tensor) -> None:
        super().__init__()
        self.baseline, self.room = baseline, room
        self.slots: dict[int, _Slots] = {}

    def kept(self, layer: int) -> list[list[int]]:
        """Returns the positions that each KV head keeps, rising."""
        return [sorted(at for at in row if at >= 0) for row in self.slots[layer].positions.tolist()]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Takes the new tokens in one after the other, and attends from each to what is kept then."""
        tokens, room = query.shape[2], self.room[layer].to(query.device)
        first = key.shape[2] - tokens
        if layer not in self.slots:
            self.slots[layer] = _empty(key[0], value[0], int(room.max()))
        slots, heads, least = self.slots[layer], torch.arange(len(room), device=room.device), int(room.min())
        grouped = query[0].unflatten(0, (len(room), -1)).float() * scaling
        keys, values = key[0, :, first:].float(), value[0, :, first:].float()
        out = []
        for asked, new_key, new_value in zip(grouped.unbind(2), keys.unbind(1), values.unbind(1), strict=True):
            slot: Tensor | int = slots.read
            if slots.read >= least:
                scores = self.baseline.scores(slots.positions, slots.received, slots.read, room)
                lowest = scores.masked_fill(slots.positions < 0, torch.inf).argmin(1)
                slot = torch.where(room > slots.read, slots.read, lowest)
            slots.put(heads, slot, new_key, new_value)
            out.append(slots.attended(asked))
        return torch.stack(out, 2).flatten(0, 1)[None].to(value.dtype)


def _empty(key: Tensor, value: Tensor, size: int) -> _Slots:
    places = len(key), size
    return _Slots(
        torch.zeros(*places, key.shape[-1], device=key.device),
        torch.zeros(*places, value.shape[-1], device=key.device),
        torch.full(places, -1, device=key.device),
        torch.zeros(places, device=key.device),
    )
