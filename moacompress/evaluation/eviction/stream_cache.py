"""A cache that holds so many tokens of each KV head and no more, and exchanges them one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from moacompress.evaluation.eviction.attention import WholeCache
from moacompress.evaluation.eviction.baseline import StreamBaseline


class _Slots:
    """The kept tokens of one layer, by slot.

    Args:
        key: of any token, `[kv_heads, any, head_dim]`.
        value: likewise.
        room: how many slots each KV head has, `[kv_heads]`.

    Attributes:
        positions: `[kv_heads, slots]`, -1 in a slot that holds nothing.
        received: attention so far, likewise.
        read: how many tokens came in.
    """

    def __init__(self, key: Tensor, value: Tensor, room: Tensor) -> None:
        heads, self._room = len(key), room
        self._least, self._most = int(room.min()), int(room.max())
        places = heads, self._most
        self._first = torch.arange(heads, device=key.device) * self._most
        self._held = torch.zeros(*places, key.shape[-1] + value.shape[-1], device=key.device)
        self._key, self._value = self._held.split((key.shape[-1], value.shape[-1]), -1)
        self.positions = torch.full(places, -1, device=key.device)
        self.received = torch.zeros(places, device=key.device)
        self.read = 0

    @property
    def _some_empty(self) -> bool:
        """Whether there are slots that hold nothing, as a KV head with less room than another has at its end."""
        return self.read < self._most or self._least < self._most

    def put(self, baseline: StreamBaseline, token: Tensor) -> None:
        """Takes the next token in, in place of the one of the lowest score where a KV head is full.

        Args:
            baseline: what scores.
            token: its key with its value behind it, `[kv_heads, head_dim + value_dim]`.
        """
        slot = self._first + self.read
        if self.read >= self._least:
            scores = baseline.scores(self.positions, self.received, self.read, self._room)
            if self._some_empty:
                scores = scores.masked_fill(self.positions < 0, torch.inf)
            lowest = self._first + scores.argmin(1)
            slot = lowest if self.read >= self._most else torch.where(self._room > self.read, slot, lowest)
        self._held.flatten(0, 1).index_copy_(0, slot, token)
        self.positions.view(-1).index_fill_(0, slot, self.read)
        self.received.view(-1).index_fill_(0, slot, 0.0)
        self.read += 1

    def attended(self, query: Tensor) -> Tensor:
        """Returns what one token gets, `[kv_heads, group, value_dim]`, and notes the attention that it gives.

        Args:
            query: `[kv_heads, group, head_dim]`, times the factor on the scores.
        """
        logits = query @ self._key.transpose(1, 2)
        if self._some_empty:
            logits = logits.masked_fill((self.positions < 0)[:, None], -torch.inf)
        weights = logits.softmax(-1)
        self.received += weights.mean(1)
        out: Tensor = weights @ self._value
        return out


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
        first = key.shape[2] - query.shape[2]
        if layer not in self.slots:
            self.slots[layer] = _Slots(key[0], value[0], self.room[layer].to(key.device))
        slots = self.slots[layer]
        grouped = query[0].unflatten(0, (len(key[0]), -1)).float() * scaling
        tokens = torch.cat((key[0, :, first:], value[0, :, first:]), -1).float()
        out = []
        for asked, token in zip(grouped.unbind(2), tokens.unbind(1), strict=True):
            slots.put(self.baseline, token)
            out.append(slots.attended(asked))
        return torch.stack(out, 2).flatten(0, 1)[None].to(value.dtype)
