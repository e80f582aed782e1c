"""The profile's compiled sweep: gradients of attention and the sums of every rule at once, where nobody looks at tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from moacompress.kernels.arguments import Choices, as_tensors
from moacompress.kernels.dispatch import backend_for
from moacompress.rules.rule_table import RuleTable

if TYPE_CHECKING:
    from moacompress.calibration.profile.tiles import AttentionSpec


class LayerSums(NamedTuple):
    """What a layer's whole backward pass sums up to, each float64 `[kv_heads, rules]`.

    Attributes:
        squares: `sum_i d_i^2`.
        total: `sum_i d_i`.
        moa: MoA's `sum |E_ij|` over what a rule masks; None where no collector asks for it.
        mass: the probability that a rule masks, mean over query heads, summed over rows; as `moa`.
        rows: rows that took part.
        of_tokens: influence of single tokens, `[kv_heads, tokens]`; None where no collector asks for it.
    """

    squares: Tensor
    total: Tensor
    moa: Tensor | None
    mass: Tensor | None
    rows: int
    of_tokens: Tensor | None = None


@runtime_checkable
class SumCollector(Protocol):
    """A collector that can do with the sums of a whole backward pass, and then is given no tiles.

    Attributes:
        baselines: whether it needs `moa` and `mass`.
        lag: where it needs `of_tokens`, tokens from a key on before which queries do not count; one for all collectors.
    """

    baselines: bool
    lag: int | None

    def add_sums(self, sums: LayerSums) -> None:
        """Takes what would have come tile by tile."""


def swept(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    spec: AttentionSpec,
    sink_logit: Tensor | None,
    table: RuleTable,
    collectors: Sequence[SumCollector],
    plan: RuleTable | None,
    choices: Choices | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of attention; collectors get the sums of all tiles.

    Args:
        query: `[1, heads, N, head_dim]`.
        key: `[1, kv_heads, N, head_dim]`.
        value: as `key`.
        grad: cotangent of the output, `[1, heads, N, head_dim]`.
        spec: how the layer attends.
        sink_logit: learned sink logit of each query head, `[heads]`, or None.
        table: the rules, for this layer.
        collectors: receive the sums.
        plan: the rule of each KV head of this layer, or None for the dense model.
        choices: what rules that select choose.

    Returns:
        Gradients of query, key and value.
    """
    baselines = any(collector.baselines for collector in collectors)
    lag = next((collector.lag for collector in collectors if collector.lag is not None), None)
    *gradients, sums, of_tokens, rows = backend_for(query).profile_backward(
        grad,
        query,
        key,
        value,
        rules=as_tensors(table),
        plan=None if plan is None else as_tensors(plan),
        scores=spec.scores(sink_logit),
        baselines=baselines,
        lag=lag,
        choices=choices,
    )
    moa, mass = sums[2:] if baselines else (None, None)
    found = LayerSums(sums[0], sums[1], moa, mass, rows, None if lag is None else of_tokens)
    for collector in collectors:
        collector.add_sums(found)
    return gradients[0], gradients[1], gradients[2]
