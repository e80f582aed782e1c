"""Caches that hold so many tokens of each KV head and no more: exchanged one by one, or as was known before."""

from __future__ import annotations

import torch
from torch import Tensor

from moacompress.evaluation.eviction.attention import WholeCache, masked_attention
from moacompress.evaluation.eviction.baseline import StreamBaseline

AT_ONCE = 128
"""Tokens that attend at a time where what is kept is known."""
NEVER = torch.iinfo(torch.int64).max


class _Slots:
    """The kept tokens of some KV heads, by slot; a KV head has as many slots as `room` says, `[kv_heads]`.

    Attributes:
        positions: `[kv_heads, slots]`, -1 in a slot that holds nothing.
        received: attention so far, `[kv_heads, slots]`.
        read: how many tokens came in.
    """

    def __init__(self, room: Tensor, key_dim: int = 0, value_dim: int = 0) -> None:
        self._room, self._least, self._most = room, int(room.min()), int(room.max())
        places = len(room), self._most
        self._first = torch.arange(len(room), device=room.device) * self._most
        self._held = torch.zeros(*places, key_dim + value_dim, device=room.device)
        self._key, self._value = self._held.split((key_dim, value_dim), -1)
        self.positions = torch.full(places, -1, device=room.device)
        self.received = torch.zeros(places, device=room.device)
        self.read = 0

    @property
    def _some_empty(self) -> bool:
        """Whether there are slots that hold nothing, as a KV head with less room than another has at its end."""
        return self.read < self._most or self._least < self._most

    def next(self, baseline: StreamBaseline) -> Tensor:
        """Returns where the next token belongs, `[kv_heads]`: in the place of that of the lowest score where a head is full.

        They are indices into all slots of all KV heads, as `held_at` and `put` take them.
        """
        slot = self._first + self.read
        if self.read >= self._least:
            scores = baseline.scores(self.positions, self.received, self.read, self._room)
            if self._some_empty:
                scores = scores.masked_fill(self.positions < 0, torch.inf)
            lowest = self._first + scores.argmin(1)
            slot = lowest if self.read >= self._most else torch.where(self._room > self.read, slot, lowest)
        return slot

    def held_at(self, slot: Tensor) -> Tensor:
        """Returns the positions of the tokens there, `[kv_heads]`, -1 for none."""
        return self.positions.view(-1)[slot]

    def put(self, slot: Tensor, token: Tensor | None = None) -> None:
        """Stores the next token where `next` said: its key with its value behind it, `[kv_heads, key_dim + value_dim]`.

        Without them only its position is stored.
        """
        if token is not None:
            self._held.flatten(0, 1).index_copy_(0, slot, token)
        self.positions.view(-1).index_fill_(0, slot, self.read)
        self.received.view(-1).index_fill_(0, slot, 0.0)
        self.read += 1

    def attended(self, query: Tensor) -> Tensor:
        """Returns what one token gets, `[kv_heads, group, value_dim]`, and notes the attention that it gives.

        The query, `[kv_heads, group, head_dim]`, has been multiplied with the factor on the scores.
        """
        logits = query @ self._key.transpose(1, 2)
        if self._some_empty:
            logits = logits.masked_fill((self.positions < 0)[:, None], -torch.inf)
        weights = logits.softmax(-1)
        self.received += weights.mean(1)
        out: Tensor = weights @ self._value
        return out


class ExchangingCache(WholeCache):
    """Takes token after token in, as attention decides; transformers' part of it only counts them. One row."""

    def __init__(self, baseline: StreamBaseline, room: Tensor) -> None:
        super().__init__()
        self.baseline, self.room = baseline, room
        self._slots: dict[int, _Slots] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Takes the new tokens in one after the other, and attends from each to what is kept then."""
        first = key.shape[2] - query.shape[2]
        if layer not in self._slots:
            self._slots[layer] = _Slots(self.room[layer].to(key.device), key.shape[-1], value.shape[-1])
        slots = self._slots[layer]
        grouped = query[0].unflatten(0, (key.shape[1], -1)).float() * scaling
        tokens = torch.cat((key[0, :, first:], value[0, :, first:]), -1).float()
        out = []
        for asked, token in zip(grouped.unbind(2), tokens.unbind(1), strict=True):
            slots.put(slots.next(self.baseline), token)
            out.append(slots.attended(asked))
        return torch.stack(out, 2).flatten(0, 1)[None].to(value.dtype)


class ScheduledCache(WholeCache):
    """Knows of each token when it is evicted, for scores by position; transformers' part of it keeps everything. One row.

    KV heads with as much room keep the same tokens, in whichever layer.
    """

    def __init__(self, baseline: StreamBaseline, room: Tensor) -> None:
        super().__init__()
        self.baseline = baseline
        sizes, self._size_of = room.unique(return_inverse=True)
        self._slots = _Slots(sizes)
        self._until = torch.empty(len(sizes), 0, dtype=torch.int64, device=room.device)
        """The position of the token that another is evicted for, by room, `[sizes, tokens]`."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attends from each new token to what is kept when it has been taken in."""
        new, total = query.shape[2], key.shape[2]
        self._read(total)
        until = self._until[self._size_of[layer]].to(key.device)  # [kv_heads, total]
        positions = torch.arange(total, device=key.device)
        out = []
        for begin in range(total - new, total, AT_ONCE):
            end = min(begin + AT_ONCE, total)
            seen = until[:, :end] > begin  # by any of these tokens
            most = int(seen.sum(1).max())
            index = (~seen).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
            now = positions[begin:end, None]
            visible = (index[:, None] <= now) & (until.gather(1, index)[:, None] > now)
            keys, values = (
                each[0].gather(1, index[..., None].expand(-1, -1, each.shape[-1])).float()[None]
                for each in (key, value)
            )
            asked = query[:, :, begin - total + new : end - total + new].float()
            out.append(masked_attention(asked, keys, values, scaling, visible))
        return torch.cat(out, 2).to(value.dtype)

    def _read(self, total: int) -> None:
        """Finds out what is evicted for the tokens up to so many, which the first layer is asked for."""
        first = self._slots.read
        evicted = []
        for _ in range(first, total):
            slot = self._slots.next(self.baseline)
            evicted.append(self._slots.held_at(slot))
            self._slots.put(slot)
        if evicted:
            later = self._until.new_full((len(self._until), total - first), NEVER)
            self._until = torch.cat((self._until, later), 1)
            gone = torch.stack(evicted, 1)  # [sizes, new tokens]
            size, token = (gone >= 0).nonzero(as_tuple=True)
            self._until[size, gone[size, token]] = first + token


def stream_cache(baseline: StreamBaseline, room: Tensor) -> WholeCache:
    """Returns a cache for a way to evict as it reads; `room` says how many tokens each KV head keeps, `[layers, kv_heads]`."""
    return (ScheduledCache if baseline.by_position else ExchangingCache)(baseline, room)
