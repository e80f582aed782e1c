"""What a backend does; `arguments` has what its calls take, `capabilities` what it says of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch

from moacompress.core.arrays import Ints
from moacompress.core.errors import UnsupportedError
from moacompress.kernels.arguments import (
    AllocationShortfall,
    CacheState,
    CacheView,
    Choices,
    LayerWeights,
    RingState,
    Rotary,
    Scores,
    SelectedView,
    TransientTokens,
)
from moacompress.kernels.block_products import block_linear
from moacompress.kernels.bound import BoundLayers, BoundRing
from moacompress.kernels.capabilities import Capabilities, PhaseTime, Status
from moacompress.kernels.kv_parts import KVPart
from moacompress.kernels.weight_blocks import WeightType
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.selection import EvictionSchedule, eviction_schedule
from moacompress.rules.share import LayerShares
from moacompress.rules.windows import BLOCK

TOKENS_AT_ONCE = 1 << 16
"""Of a chunk that are copied on their way into a cache."""
FEW_ROWS = 8
"""Rows up to which compiled products that read a weight as it lies are as fast as oneDNN's; at 16 they are slower."""


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
        transient: TransientTokens | None = None,
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
            transient: selected tokens, on the CPU; with them only `cached_gradients` say whether there are gradients.

        Returns:
            `(out, lse)`: `[rows, heads, tokens, value_dim]` of the query's dtype, and `[rows, heads, tokens]` in float32 at
            least, -inf past `valid`; numbers that are not finite as of `decode`.

        Raises:
            UnsupportedError: a visible block is not in the table, or a format is not known; RuntimeError of compiled kernels.
        """

    def decode_selecting(
        self,
        query: torch.Tensor,
        *,
        cache: CacheView,
        selected: SelectedView,
        lengths: torch.Tensor,
        rules: RuleTable,
        scores: Scores,
    ) -> torch.Tensor:
        """As `decode`, over selected tokens too; then those compete that will have left windows when the next token comes.

        What they win is copied into its place at once: so nobody has to keep the blocks of windows any longer.

        Args:
            query: `[rows, heads, head_dim]`.
            cache: written to where tokens are selected.
            selected: the tokens that are selected at `lengths`, and places for those at one more; written to.
            lengths: as of `decode`.
            rules: of the KV heads, with tensors on the CPU.
            scores: how scores are made.

        Returns:
            `[rows, heads, value_dim]`.
        """
        raise self._cannot("decode_selecting")

    def move_selected(
        self,
        kv_parts: Sequence[tuple[KVPart, KVPart]],
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        scores: Sequence[torch.Tensor],
        *,
        heads: torch.Tensor,
        slots: torch.Tensor,
        to: torch.Tensor,
    ) -> None:
        """Copies tokens to places where they are kept, with their scores; the default is in plain PyTorch.

        Args:
            kv_parts: how keys and how values are kept, of each KV head.
            keys: segments as of `CacheView`; written to.
            values: segments of values, as many; written to.
            scores: as of `SelectedView`; written to.
            heads: KV head of each token, int64 `[tokens]` on the CPU.
            slots: block id * 16 + place in the block of each token, int64 `[tokens]` on the CPU.
            to: the slot each goes to; none of them is copied from.
        """
        starts = torch.tensor([0, *(len(segment) * BLOCK for segment in keys)], device="cpu").cumsum(0)
        of, into = (torch.searchsorted(starts, where, right=True) - 1 for where in (slots, to))
        for head, source, target in torch.unique(torch.stack((heads, of, into), 1), dim=0).tolist():
            mine = (heads == head) & (of == source) & (into == target)
            here, there = (
                (where[mine] - starts[at]).to(keys[0].device) for where, at in ((slots, source), (to, target))
            )
            for kv_part, segments in zip(kv_parts[head], (keys, values), strict=True):
                kv_part.move(segments[source], here, segments[target], there)
            own, new = (scores[at].view(torch.int16) for at in (source, target))
            new[there // BLOCK, there % BLOCK] = own[here // BLOCK, here % BLOCK]

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
    ) -> tuple[torch.Tensor, AllocationShortfall | None]:
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

    def bind_ring(
        self, ring: RingState, *, rules: RuleTable, kv_dims: tuple[int, int], dtype: torch.dtype
    ) -> BoundRing:
        """Reads a layer's cache whose windows lie in rings of blocks, for steps.

        Args:
            ring: the cache.
            rules: of the KV heads, in numpy.
            kv_dims: numbers of a key and of a value.
            dtype: of the model.
        """
        raise self._cannot("bind_ring")

    def step_layer(
        self,
        hidden: torch.Tensor,
        *,
        layer: LayerWeights,
        rotary: Rotary,
        cache: CacheState,
        rules: RuleTable,
        scores: Scores,
    ) -> tuple[torch.Tensor, AllocationShortfall | None]:
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

    def few_rows(self, dtype: torch.dtype) -> int:
        """Returns up to how many rows `linear` and the steps are as fast as torch's products, or faster."""
        return FEW_ROWS

    def linear_blocks(
        self, x: torch.Tensor, blocks: torch.Tensor, kind: WeightType, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the product with a weight in blocks, of any number of rows; the default is the definition.

        It has gradients for `x` and `bias`; the blocks are constants.

        Args:
            x: `[..., inputs]`.
            blocks: uint8 `[outputs, bytes]`, contiguous, on the device of `x`.
            kind: of the blocks.
            bias: `[outputs]`, or None.

        Returns:
            `[..., outputs]`.

        Raises:
            UnsupportedError: the blocks have not as many inputs as `x`; RuntimeError of compiled kernels.
        """
        return block_linear(x, blocks, kind, bias)

    def profile_backward(
        self,
        dout: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        rules: RuleTable,
        scores: Scores,
        baselines: bool = False,
        lag: int | None = None,
        choices: Choices | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """Gradients of attention and what every rule would move, in one sweep.

        What is computed, and in PyTorch, is in `moacompress.calibration.profile.influence`.

        Args:
            dout: cotangent of the output, `[1, heads, tokens, value_dim]`.
            query: `[1, heads, tokens, head_dim]`.
            key: `[1, kv_heads, tokens, head_dim]`.
            value: `[1, kv_heads, tokens, value_dim]`.
            rules: every KV head is asked what each of them would do; one native window.
            scores: how scores are made.
            baselines: whether to sum MoA's |E| and the masked probability too.
            lag: tokens from a key on before which queries do not count in the influence of single tokens; None for none of it.
            choices: when rules that select evict tokens; without them they are taken for their sinks and windows alone.

        Returns:
            Gradients of query, key and value; sums, float64 `[2 or 4, kv_heads, rules]`: of squares and of the deltas, then of
            the baselines; influence of single tokens, float64 `[kv_heads, tokens]`, no tokens where it is not asked for; rows
            with a cotangent that is not zero: the others take no part.
        """
        raise self._cannot("profile_backward")

    def put(
        self, kv_parts: Sequence[KVPart], memory: Sequence[torch.Tensor], slots: torch.Tensor, vectors: torch.Tensor
    ) -> None:
        """Writes tokens into K or V parts of blocks, those of one KV head or of several; see `KVPart.write`.

        Args:
            kv_parts: of one size, all of keys or all of values.
            memory: of each part; blocks may lie apart.
            slots: block * 16 + place in the block, int64 `[tokens, parts]`.
            vectors: `[tokens, parts, dim]`.
        """
        for part, (kv_part, blocks) in enumerate(zip(kv_parts, memory, strict=True)):
            kv_part.write(blocks, slots[:, part], vectors[:, part])

    def append(
        self,
        kv_parts: tuple[KVPart | None, KVPart],
        key: torch.Tensor | None,
        value: torch.Tensor,
        *,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        sources: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """Writes tokens of a chunk into blocks of a pool; the default is by `put`.

        Args:
            kv_parts: how keys and how values are kept, by the KV heads of all these tokens; None where only values are written.
            key: of the chunk, `[rows, kv_heads, columns, head_dim]`, or None.
            value: of the chunk, `[rows, kv_heads, columns, value_dim]`.
            keys: segments as of `CacheView`, or none; written to.
            values: segments of values; written to.
            sources: which each token is, `(row * kv_heads + head) * columns + column`, int64 `[tokens]` on the CPU.
            slots: where each goes, block id * 16 + place in the block, int64 `[tokens]` on the CPU.
        """
        _, kv_heads, columns, _ = value.shape
        for few, where in zip(sources.split(TOKENS_AT_ONCE), slots.split(TOKENS_AT_ONCE), strict=True):
            pairs, column = few // columns, few % columns
            at = tuple(part.to(value.device) for part in (pairs // kv_heads, pairs % kv_heads, column))
            for kv_part, vectors, segments in zip(kv_parts, (key, value), (keys, values), strict=True):
                if kv_part is None or vectors is None:
                    continue
                picked, first = vectors[at], 0
                for segment in segments:
                    end = first + len(segment) * BLOCK
                    inside = torch.nonzero((where >= first) & (where < end))[:, 0]
                    if len(inside):
                        here = (where[inside] - first).to(value.device)
                        own = picked if len(inside) == len(where) else picked[inside.to(value.device)]
                        self.put([kv_part], [segment], here[:, None], own[:, None])
                    first = end

    def eviction_schedule(self, tokens: EvictionSchedule, rules: RuleTable, scores: Ints) -> EvictionSchedule:
        """Lets tokens compete to be selected; the default is the definition in `rules.selection`.

        Args:
            tokens: that compete.
            rules: of the KV heads, with a numpy array.
            scores: of the tokens, `[tokens]`.
        """
        return eviction_schedule(tokens, rules, scores)

    def start_trace(self) -> None:
        """Has the steps of this process traced from now on; what was traced before is forgotten.

        Raises:
            UnsupportedError: not without the capability `trace`.
        """
        raise self._cannot("start_trace")

    def stop_trace(self) -> Mapping[str, PhaseTime]:
        """Ends that, and returns what was traced since, by the names of the phases: each moment of a step is in one of them.

        Raises:
            UnsupportedError: not without the capability `trace`.
        """
        raise self._cannot("stop_trace")

    def _cannot(self, call: str) -> UnsupportedError:
        return UnsupportedError(f"the kernel {self.name!r} has no {call}; ask its capabilities first")


def refuse_gradients(query: torch.Tensor) -> None:
    """Refuses a decode that would need gradients, for backends without `cached_gradients`.

    Raises:
        UnsupportedError: the query needs gradients.
    """
    if query.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError(
            "decode has no gradients; train without a cache (use_cache=False), or use torch.no_grad()"
        )


def prefill_alone(
    backend: Backend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    rules: RuleTable,
    scores: Scores,
    transient: TransientTokens | None = None,
) -> torch.Tensor:
    """Returns attention of whole rows, with no past and no padding, `[rows, heads, tokens, value_dim]`."""
    past = torch.zeros(key.shape[0], dtype=torch.int64, device="cpu")
    whole = torch.full_like(past, key.shape[2])
    return backend.prefill(
        query,
        key,
        value,
        cache=CacheView.empty(key),
        past=past,
        valid=whole,
        rules=rules,
        scores=scores,
        transient=transient,
    )[0]
