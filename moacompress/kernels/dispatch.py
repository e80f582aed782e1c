"""Which kernel runs: the compiled one for the CPU, or the reference in plain PyTorch.

`MOACOMPRESS_KERNEL=cpu` or `=reference` overrides the choice; a kernel that was asked for and cannot run is an error, never a
silent change.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from moacompress.core.errors import UnsupportedError, UsageError
from moacompress.kernels import cpu_ops
from moacompress.kernels.block_reference import reference_decode, reference_prefill

KERNELS = ("cpu", "reference")
VARIABLE = "MOACOMPRESS_KERNEL"
logger = logging.getLogger(__name__)


class CacheState(NamedTuple):
    """A layer's cache as the calls of a step take it; see `step` for shapes.

    Attributes:
        keys: the pool's segments of keys.
        values: its segments of values.
        table: the block table.
        lengths: tokens of every row.
        runs: the blocks held.
        refs: how many table entries name each block.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    table: torch.Tensor
    lengths: torch.Tensor
    runs: torch.Tensor
    refs: torch.Tensor


@dataclass(frozen=True)
class Choice:
    """The kernel that runs on the CPU.

    Attributes:
        name: one of `KERNELS`.
        isa: instruction set of a compiled kernel, or None.
        reason: why this one.
        asked: whether the environment names it.
    """

    name: str
    isa: str | None
    reason: str
    asked: bool = False


def choose(wanted: str | None, built: cpu_ops.Built) -> Choice:
    """Returns the kernel to run.

    Args:
        wanted: value of MOACOMPRESS_KERNEL, or None or empty for the best there is.
        built: whether the compiled kernels can run.

    Raises:
        UsageError: no kernel of that name.
        UnsupportedError: the kernel that is asked for cannot run.
    """
    if wanted and wanted not in KERNELS:
        raise UsageError(f"{VARIABLE} is {wanted!r}, not one of {', '.join(KERNELS)}")
    if wanted == "reference":
        return Choice("reference", None, f"{VARIABLE} asks for it", asked=True)
    if built.isa is not None:
        reason = f"{VARIABLE} asks for it" if wanted else "the extension is built for this machine"
        return Choice("cpu", built.isa, reason, asked=bool(wanted))
    if wanted:
        raise UnsupportedError(f"{VARIABLE} asks for the kernel 'cpu', which cannot run: {built.reason}")
    return Choice("reference", None, built.reason or "")


@functools.cache
def chosen() -> Choice:
    """Returns the kernel of this process; says which, once.

    Raises:
        UsageError: MOACOMPRESS_KERNEL or MOACOMPRESS_ISA names nothing that there is.
        UnsupportedError: the kernel that is asked for cannot run.
    """
    choice = choose(os.environ.get(VARIABLE), cpu_ops.load())
    logger.info("kernel: %s%s (%s)", choice.name, f", {choice.isa}" if choice.isa else "", choice.reason)
    return choice


def kernel_for(query: torch.Tensor) -> str:
    """Returns the name of the kernel that runs for tensors of this device and dtype.

    Raises:
        UnsupportedError: the environment asks for a kernel that does not know the dtype or the device.
    """
    name: str = _chosen_name()
    if name == "cpu" and (query.device.type != "cpu" or query.dtype not in cpu_ops.DTYPES):
        if chosen().asked:
            raise UnsupportedError(
                f"{VARIABLE}=cpu cannot run {query.dtype} on {query.device.type}; it knows float32, bfloat16 and float16 on "
                f"the CPU; unset {VARIABLE}"
            )
        return "reference"
    return name


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _chosen_name() -> str:
    """A constant to `torch.compile`, which cannot trace the loading of a library."""
    return chosen().name


def decode(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    table: torch.Tensor,
    lengths: torch.Tensor,
    sink: torch.Tensor,
    alpha: torch.Tensor,
    beta_q: torch.Tensor,
    min_window: int,
    native_window: int,
    scaling: float,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query per row over its blocks; arguments and results as of `reference_decode`.

    Raises:
        UnsupportedError: the query needs gradients; or as `kernel_for` and `reference_decode` say.
    """
    if query.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError(
            "decode has no gradients; train without a cache (use_cache=False), or use torch.no_grad()"
        )
    rules = (sink, alpha, beta_q, min_window, native_window, scaling, softcap)
    if kernel_for(query) == "reference":
        return reference_decode(query, keys, values, table, lengths, *rules, sink_logits)
    found: tuple[torch.Tensor, torch.Tensor] = torch.ops.moacompress_cpu.decode(
        _rows(query), list(keys), list(values), table, lengths, *rules, _floats(sink_logits)
    )
    return found


def step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    *rest: Any,
) -> tuple[torch.Tensor, int]:
    """Puts one more token of every row into its cache and attends to it; only where `kernel_for(query)` is compiled.

    Args:
        query: `[rows, heads, 1, head_dim]`.
        key: `[rows, kv_heads, 1, head_dim]`.
        value: `[rows, kv_heads, 1, value_dim]`.
        keys: the pool's segments, `[blocks, 16, head_dim]` each; written to.
        values: its segments of values; written to.
        *rest: what is written to: the block table, int32 `[rows, kv_heads, width]`, the tokens of every row, int64 `[rows]`,
            the blocks held (`runtime.runs.Runs.ends`), int64 `[4, rows, kv_heads]`, and how many table entries name each block,
            int32 `[blocks]`; then sink, alpha and beta_q, the smallest and the native window (0: none), the tokens that are
            kept longer for rolling back, and scaling, softcap and learned logits as `decode` takes them.

    Returns:
        `[rows, 1, heads, value_dim]` and 0; or something and 1 where the table is too narrow, 1 + n where the pool lacks n
        blocks: the call is then made again.
    """
    *state, sink_logits = rest
    token = (_rows(query), _rows(key), _rows(value))
    found: tuple[torch.Tensor, int] = torch.ops.moacompress_cpu.step(
        *token, list(keys), list(values), *state, _floats(sink_logits)
    )
    return found


def step_hidden(
    hidden: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    rotary: tuple[torch.Tensor, torch.Tensor],
    *state: Any,
) -> tuple[torch.Tensor, int]:
    """As `step`, from what the attention layer gets: queries, keys and values are made in the same call.

    Args:
        hidden: `[rows, 1, inputs]`.
        weights: of the queries, keys and values, `[outputs, inputs]` each, contiguous.
        biases: theirs, or none.
        rotary: cosines and sines of the rotary position embeddings, `[rows or 1, 1, head_dim]` each; the two halves of a head
            are the coordinates that are rotated.
        *state: what `step` takes from `keys` on.

    Returns:
        As `step`.
    """
    keys, values, *rest, sink_logits = state
    tables = (_rows(rotary[0]), _rows(rotary[1]), list(keys), list(values))
    found: tuple[torch.Tensor, int] = torch.ops.moacompress_cpu.step_hidden(
        hidden, list(weights), list(biases), *tables, *rest, _floats(sink_logits)
    )
    return found


def step_layer(
    hidden: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    norms: Sequence[torch.Tensor],
    eps: float,
    rotary: tuple[torch.Tensor, torch.Tensor],
    *state: Any,
) -> tuple[torch.Tensor, int]:
    """As `step_hidden`, for a whole decoder layer: what comes around attention is made in the same call.

    Args:
        hidden: the residual stream, `[rows, 1, hidden]`.
        weights: of the queries, keys, values and of what attention gives; then of the feed-forward's gate, of what is gated,
            and of its last product. `[outputs, inputs]` each, contiguous.
        biases: of the queries, keys and values, or none.
        norms: weights of the root mean square norms before attention and before the feed-forward, `[hidden]` each.
        eps: added to the mean squares.
        rotary: as of `step_hidden`.
        *state: likewise.

    Returns:
        `[rows, 1, hidden]` and the number, as `step`.
    """
    keys, values, *rest, sink_logits = state
    layer = (list(weights), list(biases), list(norms), eps, _rows(rotary[0]), _rows(rotary[1]))
    found: tuple[torch.Tensor, int] = torch.ops.moacompress_cpu.step_layer(
        hidden, *layer, list(keys), list(values), *rest, _floats(sink_logits)
    )
    return found


def read_layers(
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    norms: Sequence[torch.Tensor],
    eps: float,
    head_dim: int,
    columns: Sequence[torch.Tensor],
    min_window: int,
    native_windows: Sequence[int],
    scaling: float,
) -> int:
    """Reads decoder layers for `step_layers`; only where `kernel_for` their weights is compiled.

    Args:
        weights: seven of each layer, as of `step_layer`.
        biases: three of each layer, or none at all.
        norms: two of each layer.
        eps: added to the mean squares.
        head_dim: of queries and keys.
        columns: sink, alpha and beta_q of each layer.
        min_window: of all.
        native_windows: of each layer, 0 for none.
        scaling: factor on the scores.

    Returns:
        Their number, for `cpu_ops.forget_layers` when they are not needed any more. The tensors stay until then.
    """
    rules = (list(columns), min_window, list(native_windows), scaling)
    number: int = torch.ops.moacompress_cpu.read_layers(list(weights), list(biases), list(norms), eps, head_dim, *rules)
    return number


def read_caches(layers: int, states: Sequence[CacheState], lag: int) -> int:
    """Reads the caches of decoder layers.

    Args:
        layers: the layers' number.
        states: of each layer. All tensors are written to in steps, and the caches must be read anew (`read_cache` if it is one)
            when there is another in the place of one.
        lag: tokens that are kept longer for rolling back.

    Returns:
        Their number, for `cpu_ops.forget_caches`.
    """
    keys, values = [t for state in states for t in state.keys], [t for state in states for t in state.values]
    segments, parts = [len(state.keys) for state in states], [t for state in states for t in state[2:]]
    number: int = torch.ops.moacompress_cpu.read_caches(layers, keys, values, segments, parts, lag)
    return number


def read_cache(caches: int, layer: int, state: CacheState, lag: int) -> None:
    """Reads one layer's cache anew; see `read_caches`."""
    torch.ops.moacompress_cpu.read_cache(caches, layer, list(state.keys), list(state.values), list(state[2:]), lag)


def step_layers(
    hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], caches: int, first: int
) -> tuple[torch.Tensor, int, int]:
    """As `step_layer` for decoder layers one after the other.

    It writes to caches that it is not given, so it must not be traced.

    Args:
        hidden: what comes into the layer `first`, `[rows, 1, hidden]`.
        rotary: as of `step_hidden`.
        caches: the caches' number.
        first: the first layer's index.

    Returns:
        What came out of the last layer that was done, `[rows, 1, hidden]`, if any was; how many layers are done, those before
        `first` included; and 0 if these are all. Otherwise what the next one wants, as `step` says it; or -1, and nothing is
        done, where a weight is not in the memory any more that it was read in.
    """
    found: tuple[torch.Tensor, int, int] = torch.ops.moacompress_cpu.step_layers(
        hidden, _rows(rotary[0]), _rows(rotary[1]), caches, first
    )
    return found


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    table: torch.Tensor,
    past: torch.Tensor,
    valid: torch.Tensor,
    sink: torch.Tensor,
    alpha: torch.Tensor,
    beta_q: torch.Tensor,
    min_window: int,
    native_window: int,
    scaling: float,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a chunk over cache and chunk; arguments and results as of `reference_prefill`.

    Without segments (no cache) it has gradients for the query, key, value and learned logits.
    """
    rules = (sink, alpha, beta_q, min_window, native_window, scaling, softcap)
    if kernel_for(query) == "reference":
        return reference_prefill(query, key, value, keys, values, table, past, valid, *rules, sink_logits)
    chunk = (_rows(query), _rows(key), _rows(value))
    found: tuple[torch.Tensor, torch.Tensor] = torch.ops.moacompress_cpu.prefill(
        *chunk, list(keys), list(values), table, past, valid, *rules, _floats(sink_logits)
    )
    return found


def prefill_alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rules: Any, **more: Any) -> Any:
    """`prefill` where no row has a past and every token is real: `rules` are those of `prefill` from `sink` on."""
    rows, kv_heads, tokens = key.shape[:3]
    table = torch.empty((rows, kv_heads, 0), dtype=torch.int32, device=query.device)
    past = torch.zeros(rows, dtype=torch.int64, device=query.device)
    return prefill(query, key, value, (), (), table, past, torch.full_like(past, tokens), *rules, **more)


def profile_backward(
    dout: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rules: torch.Tensor,
    min_window: int,
    plan: torch.Tensor | None,
    plan_min_window: int,
    native_window: int,
    scaling: float,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
    baselines: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Gradients of attention and what every rule would move, in one sweep; only where `kernel_for(query)` is compiled.

    What is computed, and in PyTorch, is in `moacompress.calibration.influence`.

    Args:
        dout: cotangent of the output, `[1, heads, tokens, value_dim]`.
        query: `[1, heads, tokens, head_dim]`.
        key: `[1, kv_heads, tokens, head_dim]`.
        value: `[1, kv_heads, tokens, value_dim]`.
        rules: sink, alpha and beta_q, int64 `[3, rules]`; every KV head is asked what each would do.
        min_window: their smallest window, tokens.
        plan: the rule that each KV head runs under, int64 `[3, kv_heads]`, or None for the dense model.
        plan_min_window: its smallest window.
        native_window: the model's own sliding window, 0 for none.
        scaling: factor of the logits.
        softcap: soft cap of the logits, 0 for none.
        sink_logits: learned sink logits, `[heads]`, or None.
        baselines: whether to sum MoA's |E| and the masked probability too.

    Returns:
        Gradients of query, key and value; sums, float64 `[2 or 4, kv_heads, rules]`: of squares and of the deltas, then of the
        baselines; rows with a cotangent that is not zero: the others take no part.
    """
    tensors = (_rows(dout), _rows(query), _rows(key), _rows(value))
    numbers = (plan_min_window, native_window, scaling, softcap)
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]
    found = torch.ops.moacompress_cpu.profile_backward(
        *tensors, rules, min_window, plan, *numbers, _floats(sink_logits), baselines
    )
    return found


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor with its last dimension contiguous; the others may have any strides."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _floats(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float().contiguous()
