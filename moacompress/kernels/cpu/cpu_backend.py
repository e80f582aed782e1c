"""The compiled kernels as a backend."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from typing import Any

import torch

from moacompress.core.arrays import Ints
from moacompress.kernels.arguments import (
    AllocationShortfall,
    CacheState,
    CacheView,
    Choices,
    LayerWeights,
    Rotary,
    Scores,
    SelectedView,
    TransientTokens,
    dense_rows,
)
from moacompress.kernels.backend import Backend, refuse_gradients
from moacompress.kernels.block_products import block_linear
from moacompress.kernels.bound import BoundCaches, BoundLayers, WeightsMoved
from moacompress.kernels.capabilities import Capabilities, PhaseTime, Status
from moacompress.kernels.cpu import library
from moacompress.kernels.kv_parts import KVPart
from moacompress.kernels.weight_blocks import NATIVE, WeightType
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.selection import EvictionSchedule
from moacompress.rules.share import LayerShares, value_sets_of

MOVED = -1
"""What the operator `step_layers` returns where a weight is elsewhere than it was."""
FEW_ROWS_OF_BLOCKS = 16
"""Rows up to which codes are multiplied as they are read; for more it is quicker to dequantize them first."""
TILED_ROWS = 64
"""Rows of bfloat16 up to which products of tiles take plain weights as they lie; see linear_tiles.inl."""
TOO_NARROW = 1
"""What the operators of a step return where the table is too narrow; 0 when done. See `_shortfall`."""
SHORTFALL_HEADS = 1 << 16
"""They return 1 + n * SHORTFALL_HEADS + h where the pool lacks n blocks of the formats of KV head h."""
PHASES = (
    "norms",
    "q, k and v products",
    "rotary",
    "gates",
    "append",
    "attention",
    "output product",
    "MLP products",
    "other products, the head's",
    "checks and memory",
)
"""Phases of a traced step, in the order of `trace.h`."""


class CpuBackend(Backend):
    """C++ on the CPU, for float32, bfloat16 and float16; it works where the extension is built."""

    name = "cpu"
    known = "float32, bfloat16 and float16 on the CPU"
    capabilities = Capabilities(
        prefill_gradients=True,
        traced=True,
        decode_selecting=True,
        step=True,
        step_layer=True,
        stack=True,
        linear=True,
        linear_blocks=True,
        profile=True,
        trace=True,
    )

    def status(self) -> Status:
        """See `Backend`.

        Raises:
            UsageError: MOACOMPRESS_ISA names no instruction set of this processor.
        """
        return library.load()

    def supports(self, device: str, dtype: torch.dtype) -> bool:
        """Whether tensors are on the CPU, in one of the dtypes that are compiled."""
        return device == "cpu" and dtype in library.DTYPES

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
        """See `Backend.decode`.

        Raises:
            UnsupportedError: the query needs gradients; a visible block is not in the table.
        """
        refuse_gradients(query)
        found: tuple[torch.Tensor, torch.Tensor] = torch.ops.moacompress_cpu.decode(
            dense_rows(query),
            list(cache.keys),
            list(cache.values),
            cache.table,
            lengths,
            rules.columns,
            *_numbers(scores),
            cache.value_dim,
        )
        return found

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
        """See `Backend.decode_selecting`; in one call."""
        found: torch.Tensor = torch.ops.moacompress_cpu.decode_selecting(
            dense_rows(query),
            list(cache.keys),
            list(cache.values),
            list(selected.scores),
            cache.table,
            selected.table,
            lengths,
            rules.columns,
            *_numbers(scores),
            cache.value_dim,
        )
        return found

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
        """See `Backend.move_selected`."""
        formats = _codes(tuple(part.code for side in zip(*kv_parts, strict=True) for part in side)).view(2, -1)
        key, value = kv_parts[0]
        torch.ops.moacompress_cpu.move_selected(
            list(keys), list(values), list(scores), heads, slots, to, formats, key.dim, value.dim
        )

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
        """Returns `[batch, heads, tokens, value_dim]` by the compiled kernel, in tiles of queries and keys."""
        held = (list(cache.keys), list(cache.values), cache.table, past, valid)
        found: tuple[torch.Tensor, torch.Tensor] = torch.ops.moacompress_cpu.prefill(
            dense_rows(query),
            dense_rows(key),
            dense_rows(value),
            *held,
            rules.columns,
            *_numbers(scores),
            [*(transient or ())],
        )
        return found

    def put(
        self, kv_parts: Sequence[KVPart], memory: Sequence[torch.Tensor], slots: torch.Tensor, vectors: torch.Tensor
    ) -> None:
        """Writes tokens `[tokens, parts, dim]` into their slots of all parts in one call."""
        codes = _codes(tuple(kv_part.code for kv_part in kv_parts))
        torch.ops.moacompress_cpu.put(
            list(memory), slots.contiguous(), dense_rows(vectors.detach()), codes, kv_parts[0].values
        )

    def eviction_schedule(self, tokens: EvictionSchedule, rules: RuleTable, scores: Ints) -> EvictionSchedule:
        """Returns the schedule with `evicted` and `places`, int64 `[tokens]`, by the compiled definition."""
        parts = (tokens.begins, tokens.positions, tokens.admitted, scores, rules.columns)
        evicted, places = torch.ops.moacompress_cpu.eviction_schedule(*map(torch.from_numpy, parts))
        return replace(tokens, evicted=evicted.numpy(), places=places.numpy())

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
        """Appends one token a row and attends to it in one call: `[rows, heads, 1, value_dim]`, or what memory it lacks."""
        out, wanted = torch.ops.moacompress_cpu.step(
            dense_rows(query),
            dense_rows(key),
            dense_rows(value),
            *_cached(cache, rules, scores),
            [] if gate_scores is None else [cache.selected, cache.left, *_shared_values(cache)],
            None if gate_scores is None else gate_scores.contiguous(),
        )
        return out, _shortfall(wanted)

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
        """As `step`, of a whole decoder layer: hidden states `[rows, 1, hidden]` in and out."""
        projections, norms_and_mlp, _ = layer
        weights = (
            [*projections.weights, *norms_and_mlp.weights],
            list(projections.biases),
            _kinds([layer]),
            projections.centre,
            list(norms_and_mlp.norms),
            norms_and_mlp.eps,
        )
        out, wanted = torch.ops.moacompress_cpu.step_layer(
            hidden,
            *weights,
            dense_rows(rotary.cos),
            dense_rows(rotary.sin),
            *_cached(cache, rules, scores),
        )
        return out, _shortfall(wanted)

    def read_layers(
        self,
        layers: Sequence[LayerWeights],
        *,
        head_dim: int,
        rules: Sequence[RuleTable],
        scaling: float,
        shares: LayerShares = (),
    ) -> BoundLayers:
        """Reads weights, rules and shares of all layers once; their steps are then one call."""
        return _CpuLayers(layers, head_dim, rules, scaling, shares)

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Returns `[rows, outputs]`, for few rows."""
        found: torch.Tensor = torch.ops.moacompress_cpu.linear(x, weight, bias)
        return found

    def few_rows(self, dtype: torch.dtype) -> int:
        """See `Backend`; tiles multiply more of them."""
        return TILED_ROWS if dtype == torch.bfloat16 and _has_tiles() else super().few_rows(dtype)

    def linear_blocks(
        self, x: torch.Tensor, blocks: torch.Tensor, kind: WeightType, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns `[..., outputs]`; a few rows meet the codes as they are read, more of them some dequantized outputs.

        With products of tiles it is one call of the kernels for any number of rows in bfloat16.
        """
        learns = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        many = x.numel() > FEW_ROWS_OF_BLOCKS * x.shape[-1] and not (x.dtype == torch.bfloat16 and _has_tiles())
        if learns or many:
            return block_linear(x, blocks, kind, bias, compiled=True)
        found: torch.Tensor = torch.ops.moacompress_cpu.linear_blocks(x, blocks, kind.code, bias)
        return found

    def start_trace(self) -> None:
        """See `Backend`."""
        self._trace(True)

    def stop_trace(self) -> dict[str, PhaseTime]:
        """See `Backend`; the phases are `PHASES`."""
        return {name: PhaseTime(*times) for name, times in zip(PHASES, self._trace(False), strict=True)}

    @staticmethod
    def _trace(on: bool) -> list[list[float]]:
        """Returns the seconds of each phase that were traced so far, `[phases, 2]`, and begins again or stops."""
        traced = torch.empty(2, len(PHASES), dtype=torch.int64, device="cpu")
        torch.ops.moacompress_cpu.trace(traced, on)
        found: list[list[float]] = (traced.T / 1e9).tolist()
        return found

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
        """Returns the gradients and the sums over all pairs of tokens, in one sweep over tiles."""
        tensors = (dense_rows(dout), dense_rows(query), dense_rows(key), dense_rows(value))
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]
        found = torch.ops.moacompress_cpu.profile_backward(
            *tensors, rules.columns, *_numbers(scores), baselines, lag, *(choices or (None, None))
        )
        return found


class _CpuLayers(BoundLayers):
    """Decoder layers that the library keeps under a number, which operators name them by."""

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        head_dim: int,
        rules: Sequence[RuleTable],
        scaling: float,
        shares: LayerShares,
    ) -> None:
        weights = [[*layer.projections.weights, *layer.norms_and_mlp.weights] for layer in layers]
        kinds = _kinds(layers)
        biases, norms = (
            ([*layer.projections.biases] for layer in layers),
            ([*layer.norms_and_mlp.norms] for layer in layers),
        )
        lists = [list(chain.from_iterable(tensors)) for tensors in (weights, biases, norms)]
        tables = [table.columns for table in rules]
        none = torch.empty(0, device="cpu")
        gates = [t for layer in layers for t in (layer.gate or (none, none))] if any(one.gate for one in layers) else []
        centres = [none if layer.projections.centre is None else layer.projections.centre for layer in layers]
        self.number: int = torch.ops.moacompress_cpu.read_layers(
            *lists[:2],
            kinds,
            centres,
            lists[2],
            layers[0].norms_and_mlp.eps,
            head_dim,
            tables,
            scaling,
            _shares(shares, len(rules[0])),
            gates,
        )
        weakref.finalize(self, library.forget_layers, self.number).atexit = False

    def read_caches(self, states: Sequence[CacheState | None]) -> BoundCaches:
        """Reads the caches of all layers once, for steps that write into them."""
        return _CpuCaches(self.number, states)


class _CpuCaches(BoundCaches):
    """Caches that the library keeps under a number; they do not keep the layers."""

    def __init__(self, layers: int, states: Sequence[CacheState | None]) -> None:
        own = [state for state in states if state is not None]
        keys, values = [t for state in own for t in state.keys], [t for state in own for t in state.values]
        segments, parts = (
            [len(state.keys) if state else 0 for state in states],
            [t for state in own for t in _all_parts(state)],
        )
        shared_values = [t for state in own for t in _shared_values(state)]
        self.number: int = torch.ops.moacompress_cpu.read_caches(
            layers, keys, values, segments, shared_values, parts, own[0].lag
        )
        weakref.finalize(self, library.forget_caches, self.number).atexit = False

    def read_again(self, layer: int, state: CacheState) -> None:
        """Reads the cache of one layer again, whose tensors were replaced."""
        torch.ops.moacompress_cpu.read_cache(
            self.number,
            layer,
            list(state.keys),
            list(state.values),
            _shared_values(state),
            _all_parts(state),
            state.lag,
        )

    def step(
        self, hidden: torch.Tensor, rotary: Rotary, first: int
    ) -> tuple[torch.Tensor, int, AllocationShortfall | None]:
        """See `BoundCaches`."""
        out, done, wanted = torch.ops.moacompress_cpu.step_layers(
            hidden, dense_rows(rotary.cos), dense_rows(rotary.sin), self.number, first
        )
        if wanted == MOVED:
            raise WeightsMoved
        return out, done, _shortfall(wanted)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_tiles() -> bool:
    """Whether the kernels have products of tiles; a constant to `torch.compile`, which cannot trace a library's loading."""
    return library.load().isa == library.TILES


def _kinds(layers: Sequence[LayerWeights]) -> list[int]:
    """Returns the code of each weight's type of blocks, `NATIVE` of one of plain numbers; none where all are that."""
    parts = [part for layer in layers for part in (layer.projections, layer.norms_and_mlp)]
    if not any(part.kinds for part in parts):
        return []
    return [*chain.from_iterable(part.kinds or (NATIVE,) * len(part.weights) for part in parts)]


def _shortfall(wanted: int) -> AllocationShortfall | None:
    return AllocationShortfall(*divmod(wanted - TOO_NARROW, SHORTFALL_HEADS)) if wanted else None


@lru_cache
def _codes(codes: tuple[int, ...]) -> torch.Tensor:
    """Returns them as a tensor, int64."""
    return torch.tensor(codes, device="cpu")


def _numbers(scores: Scores) -> tuple[float, float, torch.Tensor | None]:
    logits = scores.sink_logits
    return scores.scaling, scores.softcap, None if logits is None else logits.float().contiguous()


def _cached(cache: CacheState, rules: RuleTable, scores: Scores) -> tuple[Any, ...]:
    """Returns what the operators of a step take of a cache, and how it is attended to."""
    return list(cache.keys), list(cache.values), *_parts(cache), rules.columns, cache.lag, *_numbers(scores)


def _shared_values(cache: CacheState) -> list[torch.Tensor]:
    return list(chain.from_iterable(cache.shared_values))


def _shares(shares: LayerShares, kv_heads: int) -> torch.Tensor:
    """Returns of each layer its anchor, or -1, its head map and its value sets, int64 `[layers, 1 + 2 * kv_heads]`."""
    rows = [
        (-1, *[0] * 2 * kv_heads) if share is None else (share.anchor, *share.head_map, *value_sets_of(shares, layer))
        for layer, share in enumerate(shares)
    ]
    return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(rows), 1 + 2 * kv_heads)


def _all_parts(cache: CacheState) -> list[torch.Tensor]:
    """Returns `_parts`, and what gates select, of no numbers where no rule selects."""
    if cache.selected is None or cache.left is None:
        return [*_parts(cache), *[torch.empty(0, device="cpu")] * 2]
    return [*_parts(cache), cache.selected, cache.left]


def _parts(cache: CacheState) -> list[torch.Tensor]:
    return [cache.table, cache.lengths, cache.runs, cache.refs]
