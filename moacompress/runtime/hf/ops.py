"""What a compiled model calls: operators that `torch.compile` takes into its graph whole and never looks into.

Everything that depends on data (what a mask says, how long a row is, which blocks are free) is behind them, so a graph has no
breaks and no branches on data, and one graph serves every length. A graph holds tensors and numbers alone: a cache is named by
`PlanCache.handle`, a layer by its rules and its index. They run in the order of the data: each needs what the
one before it returned.
"""

from __future__ import annotations

from typing import Any

import torch

from moacompress.kernels.arguments import LayerWeights, NormAndMlpWeights, Projections, Rotary, Scores
from moacompress.runtime.cache.plan_cache import PlanCache
from moacompress.runtime.decode.context import LayerContext
from moacompress.runtime.decode.routes import dispatch
from moacompress.runtime.decode.step_requests import AttendRequest, LayerRequest
from moacompress.runtime.hf import hooks

_LIBRARY = torch.library.Library("moacompress", "DEF")
_ON_THE_HOST = (torch.Tag.cudagraph_unsafe,)
"""Of all of them: what they do on the host would not be done again where a CUDA graph is replayed."""
_LIBRARY.define("begin(Tensor fed, Tensor? cache, Tensor? mask, Tensor? positions) -> Tensor", tags=_ON_THE_HOST)
_LIBRARY.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? cache, Tensor rules, int layer, float scaling, "
    "float softcap, Tensor? s_aux, Tensor? gate_scores) -> Tensor",
    tags=_ON_THE_HOST,
)
_LIBRARY.define(
    "step_layer(Tensor hidden, Tensor[] weights, Tensor[] biases, int[] kinds, Tensor? centre, Tensor[] norms, float eps, "
    "Tensor[] around, int[] kinds_around, Tensor cos, Tensor sin, Tensor cache, Tensor rules, int layer, float scaling) "
    "-> Tensor",
    tags=_ON_THE_HOST,
)


def _cache(handle: torch.Tensor | None) -> PlanCache | None:
    return None if handle is None else PlanCache.find(handle)


def _begin(
    fed: torch.Tensor, handle: torch.Tensor | None, mask: torch.Tensor | None, positions: torch.Tensor | None
) -> torch.Tensor:
    """Does what `hooks.begin` does; returns token ids or embeddings, `[rows, tokens, ...]`, as they are."""
    hooks.begin(_cache(handle), mask, positions, *fed.shape[:2])
    return fed.clone()


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    handle: torch.Tensor | None,
    rules: torch.Tensor,
    layer: int,
    scaling: float,
    softcap: float,
    s_aux: torch.Tensor | None,
    gate_scores: torch.Tensor | None,
) -> torch.Tensor:
    """Does what an `AttendRequest` asks for; without gradients."""
    cache = _cache(handle)
    if cache is not None:
        cache.update(key, value, layer)
    context = LayerContext.from_tensor(layer, rules)
    return dispatch(
        AttendRequest(context, cache, query, key, value, mask, Scores(scaling, softcap, s_aux), gate_scores)
    )


def _step_layer(
    hidden: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    kinds: list[int],
    centre: torch.Tensor | None,
    norms: list[torch.Tensor],
    eps: float,
    around: list[torch.Tensor],
    kinds_around: list[int],
    cos: torch.Tensor,
    sin: torch.Tensor,
    handle: torch.Tensor,
    rules: torch.Tensor,
    layer: int,
    scaling: float,
) -> torch.Tensor:
    """Does what a `LayerRequest` asks for."""
    context, whole = LayerContext.from_tensor(layer, rules), PlanCache.find(handle)
    parts = LayerWeights(
        Projections(weights, biases, kinds, centre), NormAndMlpWeights(norms, eps, around, kinds_around)
    )
    return dispatch(LayerRequest(context, whole, hidden, Rotary(cos, sin), scaling, parts))


def _fake_attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    rows, heads, tokens, _ = query.shape
    return query.new_empty(rows, tokens, heads, value.shape[-1])


_LIBRARY.impl("begin", _begin, "CompositeExplicitAutograd")
_LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
_LIBRARY.impl("step_layer", _step_layer, "CompositeExplicitAutograd")
torch.library.register_fake("moacompress::begin", lambda fed, *rest: torch.empty_like(fed))
torch.library.register_fake("moacompress::attend", _fake_attend)
torch.library.register_fake("moacompress::step_layer", lambda hidden, *rest: torch.empty_like(hidden))
torch.library.register_autograd("moacompress::begin", lambda ctx, grad: (grad, None, None, None))
