"""What a backend can do, and what its calls take.

A cache is a pool of blocks of 16 tokens, in segments that count on from each other, and a table `[rows, kv_heads, width]` that
holds the block id of block `j // 16` of every (row, KV head), -1 where there is none. A segment is of one format of keys and
one of values, see `halves`; the blocks of a KV head are in segments of its formats. Tables, lengths and rules are on the CPU,
int32 or int64; a backend makes copies for its device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moacompress.core.arrays import Ints
from moacompress.core.errors import UnsupportedError
from moacompress.kernels.halves import BlockHalf
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.selection import Turnover, turnover
from moacompress.rules.share import LayerShares


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do beside `decode` and `prefill`.

    Attributes:
        prefill_gradients: `prefill` without a cache has gradients.
        traced: `prefill` without a cache, and its gradients, can be in a graph of `torch.compile`.
        cached_gradients: `decode`, and `prefill` over a cache, have gradients.
        step: `Backend.step`.
        step_hidden: `Backend.step_hidden`.
        step_layer: `Backend.step_layer`.
        stack: `Backend.read_layers`.
        linear: `Backend.linear`.
        profile: `Backend.profile_backward`.
    """

    prefill_gradients: bool = False
    traced: bool = False
    cached_gradients: bool = False
    step: bool = False
    step_hidden: bool = False
    step_layer: bool = False
    stack: bool = False
    linear: bool = False
    profile: bool = False


class Status(NamedTuple):
    """Whether a backend can run in this process.

    Attributes:
        works: whether it can.
        reason: why it cannot, and what to do; or why it is there.
        isa: instruction set or card that it runs on, or None.
    """

    works: bool
    reason: str
    isa: str | None = None


class Scores(NamedTuple):
    """How scores are made of queries and keys.

    Attributes:
        scaling: factor on the scores.
        softcap: bound of the scores by tanh (Gemma 2), 0 for none.
        sink_logits: learned logit of each query head that takes probability and gives no value (gpt-oss), `[heads]`, or None.
    """

    scaling: float
    softcap: float = 0.0
    sink_logits: torch.Tensor | None = None


class Choices(NamedTuple):
    """What rules that select choose among the tokens of a sample, when they have left the window.

    Attributes:
        gone: how many have left when a token is kept no longer, in each way to choose, int32 `[kv_heads, ways, tokens]`; of a
            token that is never kept no more than have left when it does.
        of_rule: the way of each rule, -1 of one that does not select, int64 `[rules]`. Rules of one way have one sink.
    """

    gone: torch.Tensor
    of_rule: torch.Tensor


class Passing(NamedTuple):
    """The tokens that gates keep for a while in a chunk, all rows' and KV heads' one after the other.

    A query sees one, besides what rules show it, where so many tokens have left its window: `entered` at least, and less than
    `gone`.

    Attributes:
        begins: where those of a row and KV head begin, and all end, int64 `[rows * kv_heads + 1]`.
        slots: where each is kept, block id * 16 + place in the block; -1 - t of the chunk's real token t; int64 `[tokens]`.
        entered: int64 `[tokens]`.
        gone: likewise.
    """

    begins: torch.Tensor
    slots: torch.Tensor
    entered: torch.Tensor
    gone: torch.Tensor


class CacheView(NamedTuple):
    """What attention reads of a layer's cache.

    Attributes:
        keys: the pool's segments of keys, `[blocks, 16, head_dim]` each, or `[blocks, bytes]` of codes; none if no row has a
            past.
        values: its segments of values, likewise of `value_dim`.
        table: block ids, int32 `[rows, kv_heads, width]`.
        value_dim: numbers of a value; 0 for those of the segments that are native.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    table: torch.Tensor
    value_dim: int = 0

    @staticmethod
    def empty(key: torch.Tensor) -> CacheView:
        """Returns the view of no cache, for a chunk's keys, `[rows, kv_heads, tokens, head_dim]`."""
        return CacheView((), (), torch.empty((*key.shape[:2], 0), dtype=torch.int32, device="cpu"))


class CacheState(NamedTuple):
    """What the calls of a step read of a layer's cache and write to.

    Attributes:
        keys: as of `CacheView`; written to.
        values: likewise.
        table: likewise.
        lengths: tokens of every row, int64 `[rows]`.
        runs: first block and end of every run of blocks held, int64 `[RUNS, 2, rows, kv_heads]`.
        refs: how many table entries name each block, int32 `[blocks]`.
        lag: tokens that are kept longer for rolling back.
        beside: planes of values of layers that share the keys, beside the blocks' own: of each its part of every segment, with
            no bytes where a segment has none. Where rules select, the one plane is that of the tokens' scores, int16, as bytes.
        chosen: block ids of the tokens that gates keep, by their places, int32 `[rows, kv_heads, width]`; None where no rule
            selects.
        left: how many tokens have left the window and competed, int64 `[rows, kv_heads]`; as `chosen`.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    table: torch.Tensor
    lengths: torch.Tensor
    runs: torch.Tensor
    refs: torch.Tensor
    lag: int = 0
    beside: Sequence[Sequence[torch.Tensor]] = ()
    chosen: torch.Tensor | None = None
    left: torch.Tensor | None = None


class Room(NamedTuple):
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
        weights: of the three, `[outputs, inputs]` each, contiguous.
        biases: of the three, `[outputs]` each, or none.
    """

    weights: Sequence[torch.Tensor]
    biases: Sequence[torch.Tensor]


class AroundAttention(NamedTuple):
    """What a decoder layer does around its attention.

    Attributes:
        norms: weights of its root mean square norms, before attention and before the feed-forward, `[hidden]` each.
        eps: added to the mean squares.
        weights: of what attention gives, of the feed-forward's gate, of what is gated, and of its last product.
    """

    norms: Sequence[torch.Tensor]
    eps: float
    weights: Sequence[torch.Tensor]


class Rotary(NamedTuple):
    """Rotary position embeddings of one token; the two halves of a head are the coordinates that are rotated.

    Attributes:
        cos: cosines, `[rows or 1, 1, head_dim]`.
        sin: sines, likewise.
    """

    cos: torch.Tensor
    sin: torch.Tensor


class LayerWeights(NamedTuple):
    """A whole decoder layer.

    Attributes:
        projections: of its attention.
        around: what it does around that.
        gate: weight `[kv_heads, hidden]` and bias `[kv_heads]` of what scores tokens by what enters the attention; none where
            no rule of the layer selects.
    """

    projections: Projections
    around: AroundAttention
    gate: Sequence[torch.Tensor] = ()


class BoundCaches(ABC):
    """The caches of all decoder layers as a backend has read them."""

    @abstractmethod
    def read_again(self, layer: int, state: CacheState) -> None:
        """Reads the cache of one layer, by its index, anew: there is another tensor in the place of one."""

    @abstractmethod
    def step(self, hidden: torch.Tensor, rotary: Rotary, first: int) -> tuple[torch.Tensor, int, Room | None]:
        """Runs the decoder layers from `first` on for one token of every row; it must not be traced.

        Args:
            hidden: what comes into that layer, `[rows, 1, hidden]`.
            rotary: of the token.
            first: index of the first layer.

        Returns:
            What came out of the last layer that was done, `[rows, 1, hidden]`, if any was; how many layers are done, those
            before `first` included; and what the next one lacks, None if these are all.

        Raises:
            WeightsMoved: a weight is not in the memory any more that it was read in; nothing is done.
        """


class BoundLayers(ABC):
    """All decoder layers as a backend has read them. It keeps their tensors as long as it lives."""

    @abstractmethod
    def read_caches(self, states: Sequence[CacheState | None]) -> BoundCaches:
        """Reads the caches of the layers.

        Args:
            states: of each layer, with one lag; None of one that shares attention. All tensors are written to in steps.
        """


class WeightsMoved(Exception):
    """A weight is in another memory than it was read in."""


class Backend(ABC):
    """One implementation of attention under rules.

    Attributes:
        name: as `MOACOMPRESS_KERNEL` names it.
        known: dtypes and devices that it supports, for a message.
        capabilities: what it can do beside `decode` and `prefill`.
    """

    name: str
    known = "any dtype on any device"
    capabilities = Capabilities()

    @abstractmethod
    def status(self) -> Status:
        """Returns whether it can run in this process; a result that does not change is kept.

        Raises:
            UsageError: the environment asks something of it that there is not.
        """

    @abstractmethod
    def supports(self, device: str, dtype: torch.dtype) -> bool:
        """Returns whether it runs for tensors of a type of device and a dtype."""

    @abstractmethod
    def decode(
        self,
        query: torch.Tensor,
        *,
        cache: CacheView,
        lengths: torch.Tensor,
        rules: RuleTable,
        scores: Scores,
        with_lse: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of one query per row, whose own key and value are in the cache already.

        Args:
            query: `[rows, heads, head_dim]`.
            cache: pool and table; only blocks that a query sees are read.
            lengths: tokens of the row, the current one included, int64 `[rows]` on the CPU; 0 for a row without any.
            rules: of the KV heads, with tensors on the CPU.
            scores: how scores are made.
            with_lse: whether the second result is wanted; it may be None where it is not.

        Returns:
            `(out, lse)`: `[rows, heads, value_dim]` of the query's dtype, and `[rows, heads]` in float32 at least, the log of
            the softmax's denominator, the learned logit included. A row of length 0 has zeros and -inf. Both are NaN where a
            visible score is NaN or inf, as torch's softmax is; a score of -inf has no weight, and where there is no other,
            `out` is NaN.

        Raises:
            UnsupportedError: a visible block is not in the table, or a format is not known; RuntimeError of compiled kernels.
        """

    @abstractmethod
    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        cache: CacheView,
        past: torch.Tensor,
        valid: torch.Tensor,
        rules: RuleTable,
        scores: Scores,
        with_lse: bool = False,
        passing: Passing | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of a chunk of tokens per row over the cache and over the chunk itself.

        Query t of row r stands at position `past[r] + t`. Where `capabilities` say so it has gradients, for query, key, value
        and learned logits.

        Args:
            query: `[rows, heads, tokens, head_dim]`.
            key: `[rows, kv_heads, tokens, head_dim]`, of the chunk; where a format has codes it is what they stand for that
                is attended to.
            value: `[rows, kv_heads, tokens, value_dim]`, of the chunk.
            cache: pool and table.
            past: tokens before the chunk, int64 `[rows]` on the CPU.
            valid: real tokens at the front of the chunk, int64 `[rows]` on the CPU; what follows is not read and yields zeros.
            rules: of the KV heads, with tensors on the CPU.
            scores: how scores are made.
            with_lse: whether the second result is wanted; it may be None where it is not.
            passing: tokens that gates keep, on the CPU; with them only `cached_gradients` say whether there are gradients.

        Returns:
            `(out, lse)`: `[rows, heads, tokens, value_dim]` of the query's dtype, and `[rows, heads, tokens]` in float32 at
            least, -inf past `valid`; numbers that are not finite as of `decode`.

        Raises:
            UnsupportedError: a visible block is not in the table, or a format is not known; RuntimeError of compiled kernels.
        """

    def step(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        cache: CacheState,
        rules: RuleTable,
        scores: Scores,
        gate_scores: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Room | None]:
        """Puts one more token of every row into its cache and attends to it; without gradients.

        Args:
            query: `[rows, heads, 1, head_dim]`.
            key: `[rows, kv_heads, 1, head_dim]`.
            value: `[rows, kv_heads, 1, value_dim]`.
            cache: written to.
            rules: of the KV heads, with tensors on the CPU.
            scores: how scores are made.
            gate_scores: of the tokens, int16 `[rows, kv_heads]` on the CPU; None where no rule selects.

        Returns:
            `[rows, 1, heads, value_dim]` and None; or something, and what the cache lacks.
        """
        raise self._cannot("step")

    def step_hidden(
        self,
        hidden: torch.Tensor,
        *,
        projections: Projections,
        rotary: Rotary,
        cache: CacheState,
        rules: RuleTable,
        scores: Scores,
    ) -> tuple[torch.Tensor, Room | None]:
        """Puts one more token of every row into its cache and attends to it, from what the attention layer gets.

        Args:
            hidden: `[rows, 1, inputs]`.
            projections: of the layer.
            rotary: of the token.
            cache: written to.
            rules: of the KV heads, with tensors on the CPU.
            scores: how scores are made.

        Returns:
            `[rows, 1, heads, value_dim]` and None; or something, and what the cache lacks.
        """
        raise self._cannot("step_hidden")

    def step_layer(
        self,
        hidden: torch.Tensor,
        *,
        layer: LayerWeights,
        rotary: Rotary,
        cache: CacheState,
        rules: RuleTable,
        scores: Scores,
    ) -> tuple[torch.Tensor, Room | None]:
        """Runs a decoder layer for one more token of every row, which goes into its cache.

        Args:
            hidden: the residual stream, `[rows, 1, hidden]`.
            layer: its weights.
            rotary: of the token.
            cache: written to.
            rules: of the KV heads, with tensors on the CPU.
            scores: how scores are made.

        Returns:
            `[rows, 1, hidden]` and None; or something, and what the cache lacks.
        """
        raise self._cannot("step_layer")

    def read_layers(
        self,
        layers: Sequence[LayerWeights],
        *,
        head_dim: int,
        rules: Sequence[RuleTable],
        scaling: float,
        shares: LayerShares = (),
    ) -> BoundLayers:
        """Reads all decoder layers for steps through all of them.

        Args:
            layers: their weights; all have the same `eps`, and biases or none.
            head_dim: numbers of a query and a key.
            rules: of each layer's KV heads, with tensors on the CPU.
            scaling: factor on the scores.
            shares: what each layer takes from an earlier one, or nothing; weights that it does without have no rows.
        """
        raise self._cannot("read_layers")

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Returns the product of a few rows with a weight as it lies in memory; without gradients.

        Args:
            x: `[..., inputs]`.
            weight: `[outputs, inputs]`, contiguous.
            bias: `[outputs]`, or None.

        Returns:
            `[..., outputs]`.
        """
        raise self._cannot("linear")

    def profile_backward(
        self,
        dout: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        rules: RuleTable,
        plan: RuleTable | None,
        scores: Scores,
        baselines: bool = False,
        lag: int | None = None,
        choices: Choices | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """Gradients of attention and what every rule would move, in one sweep.

        What is computed, and in PyTorch, is in `moacompress.calibration.influence`.

        Args:
            dout: cotangent of the output, `[1, heads, tokens, value_dim]`.
            query: `[1, heads, tokens, head_dim]`.
            key: `[1, kv_heads, tokens, head_dim]`.
            value: `[1, kv_heads, tokens, value_dim]`.
            rules: every KV head is asked what each of them would do; one native window.
            plan: the rule that each KV head runs under, or None for the dense model.
            scores: how scores are made.
            baselines: whether to sum MoA's |E| and the masked probability too.
            lag: tokens from a key on before which queries do not count in the influence of single tokens; None for none of it.
            choices: what rules that select choose; without them they are taken for their sinks and windows alone.

        Returns:
            Gradients of query, key and value; sums, float64 `[2 or 4, kv_heads, rules]`: of squares and of the deltas, then of
            the baselines; influence of single tokens, float64 `[kv_heads, tokens]`, no tokens where it is not asked for; rows
            with a cotangent that is not zero: the others take no part.
        """
        raise self._cannot("profile_backward")

    def put(self, half: BlockHalf, memory: torch.Tensor, slots: torch.Tensor, vectors: torch.Tensor) -> None:
        """Writes tokens into halves of blocks; see `BlockHalf.write`, which this is."""
        half.write(memory, slots, vectors)

    def turnover(
        self, scores: Ints, select_alpha: int, select_beta_q: int, kept: Ints | None = None, left: int = 0
    ) -> Turnover:
        """Lets tokens leave a window, one after the other; see `rules.selection.turnover`, which this is."""
        return turnover(scores, select_alpha, select_beta_q, kept, left)

    def _cannot(self, call: str) -> UnsupportedError:
        return UnsupportedError(f"the kernel {self.name!r} has no {call}; ask its capabilities first")


def prefill_alone(
    backend: Backend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    rules: RuleTable,
    scores: Scores,
) -> torch.Tensor:
    """Returns attention of whole rows, with no past and no padding, `[rows, heads, tokens, value_dim]`.

    Args:
        backend: which.
        query: `[rows, heads, tokens, head_dim]`.
        key: `[rows, kv_heads, tokens, head_dim]`.
        value: `[rows, kv_heads, tokens, value_dim]`.
        rules: of the KV heads, with tensors on the CPU.
        scores: how scores are made.
    """
    past = torch.zeros(key.shape[0], dtype=torch.int64, device="cpu")
    whole = torch.full_like(past, key.shape[2])
    return backend.prefill(
        query, key, value, cache=CacheView.empty(key), past=past, valid=whole, rules=rules, scores=scores
    )[0]


def as_tensors(rules: RuleTable, device: torch.device | str = "cpu") -> RuleTable:
    """Returns the table with a tensor on a device in place of its numpy array, without a copy on the CPU."""
    columns = rules.columns
    held = columns if isinstance(columns, torch.Tensor) else torch.from_numpy(columns)
    return RuleTable(held.to(device))
