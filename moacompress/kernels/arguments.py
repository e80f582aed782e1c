"""What the calls of a backend are given and return.

A cache is a pool of blocks of 16 tokens, in segments that count on from each other, and a table `[rows, kv_heads, width]` that
holds the block id of block `j // 16` of every (row, KV head), -1 where there is none. A segment is of one format of keys and
one of values, see `kv_parts`; the blocks of a KV head are in segments of its formats. Tables, lengths and rules are on the CPU,
int32 or int64; a backend makes copies for its device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from moacompress.core.arrays import Ints
from moacompress.rules.rule_table import RuleTable


class Scores(NamedTuple):
    """How scores are made of queries and keys.

    Attributes:
        softcap: bound of the scores by tanh (Gemma 2), 0 for none.
        sink_logits: learned logit of each query head that takes probability and gives no value (gpt-oss), `[heads]`, or None.
            Beside keys less a centre it is of each query, `[rows, heads, tokens]`, see `centred_keys.logits_beside`; no backend
            is given that.
    """

    scaling: float
    softcap: float = 0.0
    sink_logits: torch.Tensor | None = None

    @property
    def by_query(self) -> bool:
        """Whether learned logits are of each query."""
        return self.sink_logits is not None and self.sink_logits.ndim > 1


class Choices(NamedTuple):
    """When rules that select evict each token of a sample: counterfactuals, for every rule on offer.

    Times are those of an `EvictionSchedule`; when a token is admitted follows from its position.

    Attributes:
        evicted: in each way to select, int32 `[kv_heads, ways, tokens]`; of a token that is never selected no more than have
            left the window when it does.
        of_rule: the way of each rule, -1 of one that does not select, int64 `[rules]`. Rules of one way have one sink.
    """

    evicted: torch.Tensor
    of_rule: torch.Tensor


class TransientTokens(NamedTuple):
    """The tokens of an `EvictionSchedule` that some query of a chunk may attend to, where attention reads them.

    A query attends to one, besides what rules show it, where so many tokens have left its window: `admitted` at least, and less
    than `evicted`, int64 `[tokens]`.

    Attributes:
        begins: where those of a row and KV head begin, and all end, int64 `[rows * kv_heads + 1]`.
        slots: where each lies, block id * 16 + place in the block; -1 - t of the chunk's real token t; int64 `[tokens]`.
    """

    begins: torch.Tensor
    slots: torch.Tensor
    admitted: torch.Tensor
    evicted: torch.Tensor


class CacheView(NamedTuple):
    """What attention reads of a layer's cache.

    Attributes:
        keys: the pool's segments of keys, `[blocks, 16, head_dim]` each, or `[blocks, bytes]` of codes; none if no row has a
            past.
        values: its segments of values, as many, of `value_dim`.
        table: block ids, int32 `[rows, kv_heads, width]`.
        value_dim: numbers of a value; 0 for those of the segments that are native.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    table: torch.Tensor
    value_dim: int = 0

    @property
    def size_of_values(self) -> int:
        """Numbers of a value, those of the segments that are native where `value_dim` does not say."""
        return self.value_dim or next(segment.shape[2] for segment in self.values if segment.ndim == 3)

    @staticmethod
    def empty(key: torch.Tensor) -> CacheView:
        """Returns the view of no cache, for a chunk's keys, `[rows, kv_heads, tokens, head_dim]`."""
        return CacheView((), (), torch.empty((*key.shape[:2], 0), dtype=torch.int32, device="cpu"))


class SelectedView(NamedTuple):
    """The tokens that gates select, in blocks of a cache.

    Attributes:
        table: their block ids by their places, int32 `[rows, kv_heads, width]`.
        scores: of the tokens of every segment of the cache, int16, as bytes: uint8 `[blocks, 32]`, or `[blocks, 0]` of one
            without.
    """

    table: torch.Tensor
    scores: Sequence[torch.Tensor]


class CacheState(NamedTuple):
    """What the calls of a step read of a layer's cache and write to; keys, values and table are as of `CacheView`.

    Attributes:
        lengths: tokens of every row, int64 `[rows]`.
        runs: first block and end of every run of blocks held, int64 `[RUNS, 2, rows, kv_heads]`.
        refs: how many table entries name each block, int32 `[blocks]`.
        lag: tokens that are kept longer for rolling back.
        shared_values: values of layers that share the keys, beside the blocks' own, in sets: of each its part of every segment,
            with no bytes where a segment has none. Where rules select, the one set is that of the tokens' scores, int16, as
            bytes.
        selected: block ids of the tokens that gates select, by their places, int32 `[rows, kv_heads, width]`; None where no
            rule selects.
        left: number of tokens evicted from the window, which have competed, int64 `[rows, kv_heads]`; None where no rule
            selects.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    table: torch.Tensor
    lengths: torch.Tensor
    runs: torch.Tensor
    refs: torch.Tensor
    lag: int = 0
    shared_values: Sequence[Sequence[torch.Tensor]] = ()
    selected: torch.Tensor | None = None
    left: torch.Tensor | None = None


class RingState(NamedTuple):
    """A layer's cache while steps are taken in on its device: what it holds of windows lies in rings of blocks.

    With S blocks of sinks and a ring of K behind them, block b of a row and KV head is number b of its part of the table if
    b < S, and else number S + (b - S) mod K. So the table stays as it is while rows grow: a new block takes the place of one
    that no query sees any more. All tensors are on the device, and stay where they are; segments, lengths and counts are
    written to.

    Attributes:
        scores: as of `SelectedView`. Empty where no rule selects.
        table: block ids, int32 `[rows, kv_heads, width]`; -1 where no block will be asked for.
        sizes: S and K of every KV head, int64 `[2, kv_heads]`, in numpy.
        lengths: tokens of the rows, int64 `[rows]`.
        selected: block ids of the tokens that gates select, by their places, int32 `[rows, kv_heads, any]`; None where no rule
            selects.
        counts: how many are selected, int64 `[rows, kv_heads]`. None where no rule selects.
        shared_values: as of `CacheState`, of values.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    scores: Sequence[torch.Tensor]
    table: torch.Tensor
    sizes: Ints
    lengths: torch.Tensor
    selected: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    shared_values: Sequence[Sequence[torch.Tensor]] = ()


class AllocationShortfall(NamedTuple):
    """What a call of a step lacks; nothing is done, and it is to be made again once that is there.

    Attributes:
        blocks: of the pool; 0 where the table is too narrow.
        head: a KV head that the blocks are for: they are of its formats.
    """

    blocks: int
    head: int = 0


class Projections(NamedTuple):
    """What makes queries, keys and values of an attention layer's input.

    Attributes:
        weights: of the three, `[outputs, inputs]` each, or uint8 `[outputs, bytes]` of one in blocks, contiguous.
        biases: of the three, `[outputs]` each, or none.
        kinds: of each weight the code of its type of blocks, or `weight_blocks.NATIVE`; none where all are native.
        centre: what keys lie less, once they are rotated, float32 `[kv_heads, head_dim]`; None for nothing.
    """

    weights: Sequence[torch.Tensor]
    biases: Sequence[torch.Tensor]
    kinds: Sequence[int] = ()
    centre: torch.Tensor | None = None


class NormAndMlpWeights(NamedTuple):
    """What a decoder layer does around its attention.

    Attributes:
        norms: weights of its root mean square norms, before attention and before the feed-forward, `[hidden]` each.
        eps: added to the mean squares.
        weights: of what attention gives, of the feed-forward's gate, of what is gated, and of its last product.
        kinds: of those weights, as in `Projections`.
    """

    norms: Sequence[torch.Tensor]
    eps: float
    weights: Sequence[torch.Tensor]
    kinds: Sequence[int] = ()


class Rotary(NamedTuple):
    """Rotary position embeddings of one token, `[rows or 1, 1, head_dim]`; the two halves of a head are the coordinates."""

    cos: torch.Tensor
    sin: torch.Tensor


class LayerWeights(NamedTuple):
    """A whole decoder layer; `gate` is weight `[kv_heads, hidden]` and bias `[kv_heads]` of what scores tokens, or nothing."""

    projections: Projections
    norms_and_mlp: NormAndMlpWeights
    gate: Sequence[torch.Tensor] = ()


def dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor with its last dimension contiguous; the others may have any strides."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def as_tensors(rules: RuleTable, device: torch.device | str = "cpu") -> RuleTable:
    """Returns the table with a tensor on a device in place of its numpy array, without a copy on the CPU."""
    columns = rules.columns
    held = columns if isinstance(columns, torch.Tensor) else torch.from_numpy(columns)
    return RuleTable(held.to(device))
