"""The routes that a forward's attention can take, in one list.

A request takes the first route for its kind that can do it. A decoder layer that none can is computed around its attention,
and plain attention can always. Each route is logged when a process first takes it, and counted by the cache.

How many times longer the next route takes where each is taken, for a step of a model of SmolLM2-135M's shape
(docs/lab/decode-routes.md):

- all layers: one row, 1.20; eight rows, 1.15; padded on the left, of a tiny model, 1.24; with gates 1.82.
- one layer: hooks or adapters on other layers, 1.3 to 1.5; compiled, eight rows 1.2 and one row in bfloat16 1.4.
- ring step: on a GPU, where nothing has been measured yet.
- cache step: other families, adapters, hooks on attention, 1.3; eight rows of which some have ended, 1.19; gates and a hook,
  1.7; sixteen rows of a tiny model, 1.6.
- plain: prompts, drafts, gradients; with the kernels in plain PyTorch drafts take 1.52.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch

from moacompress.core.arrays import Ints
from moacompress.core.errors import UnsupportedError
from moacompress.kernels.arguments import CacheView, Scores, TransientTokens
from moacompress.kernels.centred_keys import beside_logits
from moacompress.kernels.dispatch import REFERENCE, backend_for, backend_with_gradients
from moacompress.kernels.reference.rounding import as_kept
from moacompress.kernels.reference.transient import attend_transient, merged
from moacompress.kernels.selected_attention import attend_selected
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.selection import EvictionSchedule
from moacompress.rules.windows import BLOCK
from moacompress.runtime.cache.layer_cache import PlanCacheLayer
from moacompress.runtime.cache.reuse_layer import ReuseCacheLayer
from moacompress.runtime.cache.selected_tokens import schedule_of_chunk, transient_tokens
from moacompress.runtime.decode.all_layers import can_step_all, step_all
from moacompress.runtime.decode.context import LayerContext
from moacompress.runtime.decode.gate_gradients import Attended, with_gate_gradients
from moacompress.runtime.decode.step_requests import AttendRequest, LayerRequest, Request, StackRequest

logger = logging.getLogger(__name__)
RequestKind = TypeVar("RequestKind", bound=Request)


class Route(ABC, Generic[RequestKind]):
    """One way to do what a request asks for.

    Attributes:
        name: as the log and `bench` show it.
        takes: the kind of request.
    """

    name: str
    takes: type[RequestKind]

    @abstractmethod
    def can(self, request: RequestKind) -> bool:
        """Returns whether it can do what is asked for; nothing is changed."""

    @abstractmethod
    def run(self, request: RequestKind) -> torch.Tensor | None:
        """Does it, cache included; None, and nothing is done, where it cannot after all."""


class AllLayers(Route[StackRequest]):
    """All decoder layers in one compiled call."""

    name, takes = "all layers", StackRequest

    def can(self, request: StackRequest) -> bool:
        """Whether there are few rows and no autocast, layers that are known and as they were read, and caches with memory."""
        return can_step_all(request)

    def run(self, request: StackRequest) -> torch.Tensor | None:
        """Returns `[rows, 1, hidden]`."""
        return step_all(request)


class OneLayer(Route[LayerRequest]):
    """A decoder layer in one compiled call."""

    name, takes = "one layer", LayerRequest

    def can(self, request: LayerRequest) -> bool:
        """Whether the backend has such a call, and the cache memory."""
        return backend_for(request.hidden).capabilities.step_layer and request.cache.can_step(request.hidden)

    def run(self, request: LayerRequest) -> torch.Tensor:
        """Returns `[rows, 1, hidden]`."""
        cache, backend = request.cache, backend_for(request.hidden)
        cache.check_rows(request.hidden.shape[0])
        return cache.stepped(
            lambda state: backend.step_layer(
                request.hidden,
                layer=request.weights,
                rotary=request.rotary,
                cache=state,
                rules=request.context.rules,
                scores=Scores(request.scaling),
            )
        )


class RingStep(Route[AttendRequest]):
    """One token a row: into rings of blocks and attended to on the device, while the host waits for nothing.

    A layer that shares attention has the probabilities of its anchor's step, and reads no keys.
    """

    name, takes = "ring step", AttendRequest

    def can(self, request: AttendRequest) -> bool:
        """Whether the backend has such a step; there must be no gradient, and a cache with memory, or an anchor's step."""
        query, cache = request.query, request.cache
        if not backend_for(query).capabilities.ring or request.tokens != 1 or request.learns or request.scores.by_query:
            return False
        if isinstance(cache, ReuseCacheLayer):
            return cache.can_step_in_ring
        return cache is not None and cache.can_step_in_ring(query, scored=request.gate_scores is not None)

    def run(self, request: AttendRequest) -> torch.Tensor | None:
        """Returns `[rows, 1, heads, value_dim]`; None where rows or caches share blocks."""
        cache, of_gates, real = request.cache, request.gate_scores, request.chunk.real
        if isinstance(cache, ReuseCacheLayer):
            return cache.step_in_ring(request.scores)
        assert cache is not None
        gated = None if of_gates is None else of_gates[:, :, 0]
        given = None if real is None else real[:, 0]
        return cache.step_in_ring(request.query, request.scores, gated, backend_for(request.query), given)


class CacheStep(Route[AttendRequest]):
    """One token a row into the cache, and then attended to: in one compiled call where all are real and there is such a call.

    Otherwise the cache takes in the real ones first: what is evicted is not seen any more, and can make room. A padded query
    sees what its row's last real token sees.
    """

    name, takes = "cache step", AttendRequest

    def can(self, request: AttendRequest) -> bool:
        """Whether there is a cache, one token and no gradient: what is cached has none."""
        return request.cache is not None and request.tokens == 1 and not request.learns

    def run(self, request: AttendRequest) -> torch.Tensor:
        """Returns `[rows, 1, heads, value_dim]`."""
        cache, query, rules, of_gates = request.cache, request.query, request.context.rules, request.gate_scores
        assert cache is not None
        backend, single = backend_for(query), request.chunk.real is None and not request.scores.by_query
        if single and backend.capabilities.step and cache.can_step(query, scored=of_gates is not None):
            token = (query, request.key.detach(), request.value.detach())
            gated = None if of_gates is None else of_gates[:, :, 0].cpu()
            return cast(PlanCacheLayer, cache).step_pending(
                lambda state: backend.step(*token, cache=state, rules=rules, scores=request.scores, gate_scores=gated)
            )
        cache.commit(request.chunk, of_gates)  # type: ignore[arg-type]
        return _decoded(request, query[:, :, 0], cache.view(), cache.lengths, rules)[:, None].contiguous()


class Plain(Route[AttendRequest]):
    """Attention of a chunk over cache and chunk; then the cache takes it in."""

    name, takes = "plain", AttendRequest

    def can(self, request: AttendRequest) -> bool:
        """Returns True."""
        return True

    def run(self, request: AttendRequest) -> torch.Tensor:
        """Returns `[batch, tokens, heads, value_dim]`, 0 for padding but in the last column."""
        cache, chunk, batch = request.cache, request.chunk, len(request.query)
        past = np.zeros(batch, np.int64) if cache is None else cache.lengths
        cached = cache is not None and bool(past.any())
        view = cast(Any, cache).view() if cached else CacheView.empty(request.key)
        order = None if chunk.real is None else torch.from_numpy(chunk.order)[:, None, :, None].to(request.query.device)
        query, key, value = (
            tensor if order is None else tensor.gather(2, order.expand_as(tensor))
            for tensor in (request.query, request.key, request.value)
        )
        asked, rules = (query, key, value), request.context.rules
        alone = not cached and (cache is None or request.learns)
        if not cached and request.learns:
            asked, rules = straight_through(request.context, *asked)
        schedule = transient = None
        if request.gate_scores is not None:
            held = None if cache is None else cast(PlanCacheLayer, cache).held
            in_numpy = RuleTable(request.context.rules.columns.numpy())
            schedule = schedule_of_chunk(in_numpy, past, request.gate_scores, chunk, held)
            transient = transient_tokens(schedule, past, held)
        scores = request.scores
        if scores.by_query and order is not None:
            logits = cast(torch.Tensor, scores.sink_logits)
            scores = scores._replace(sink_logits=logits.gather(2, order[..., 0].expand_as(logits)))
        sinks = () if scores.sink_logits is None else (scores.sink_logits,)
        backend = backend_with_gradients(*asked, *sinks, cached=cached or transient is not None)
        if scores.by_query and request.learns:  # logs of denominators have gradients there
            backend = REFERENCE
        out, _ = beside_logits(
            lambda scores, with_lse: backend.prefill(
                *asked,
                cache=view,
                past=torch.from_numpy(past),
                valid=torch.from_numpy(chunk.counts(batch)),
                rules=rules,
                scores=scores,
                with_lse=with_lse,
                transient=transient,
            ),
            scores,
            with_lse=False,
        )
        out = out.to(query.dtype)
        if request.trained_scores is not None:
            out = _with_gate_gradients(request, out, asked, schedule, cached)
        if order is not None:
            out = torch.zeros_like(out).scatter(2, order.expand_as(out), out)
        if cache is not None:
            cache.commit(chunk, request.gate_scores, schedule)  # type: ignore[arg-type]
        if chunk.real is not None and not chunk.real[:, -1].all():
            out = _with_padded_ends(request, key, value, out, transient, alone)
        return out.transpose(1, 2).contiguous()


def _with_gate_gradients(
    request: AttendRequest,
    out: torch.Tensor,
    asked: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    schedule: EvictionSchedule | None,
    cached: bool,
) -> torch.Tensor:
    """Returns `out` with gradients for the gates, see `gate_gradients`.

    Raises:
        UnsupportedError: something is in the cache, or there is padding.
    """
    assert schedule is not None
    assert request.trained_scores is not None
    if cached or request.chunk.real is not None:
        raise UnsupportedError(
            "gates are trained on whole rows: call the model with an empty cache or use_cache=False, and without padding, or "
            "freeze them"
        )
    rules = RuleTable(request.context.rules.columns.numpy())
    return with_gate_gradients(out, request.trained_scores, Attended(*asked, rules, schedule, request.scores))


def straight_through(
    context: LayerContext, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], RuleTable]:
    """Returns what to attend with under rules without codes so that it is as with them, and the rules.

    In float32, keys and values are what their codes stand for; gradients pass straight through the rounding.

    `query`: `[batch, heads, tokens, head_dim]`. `key`: `[batch, kv_heads, tokens, head_dim]`.
    """
    rules = context.rules if context.formats is None else context.rules.native()
    return as_kept(query, key, value, context.formats), rules


def _with_padded_ends(
    request: AttendRequest,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    transient: TransientTokens | None,
    alone: bool,
) -> torch.Tensor:
    """Returns `out` with attention for the last column of rows that end in padding.

    `generate` continues from the last column, whatever it holds. As in the dense model a padded query sees what is real before
    it: what the row's last real token sees.

    Args:
        request: its chunk is in the cache already, if there is one.
        key: of the chunk, each row's real tokens first, `[batch, kv_heads, tokens, head_dim]`.
        value: of the same tokens, `[batch, kv_heads, tokens, value_dim]`.
        out: `[batch, heads, tokens, value_dim]`.
        transient: the selected tokens that the chunk attends to; None where no rule selects.
        alone: whether the chunk is all that there is, and is attended to as it is: what is cached has no gradients.
    """
    cache, chunk = request.cache, request.chunk
    assert chunk.real is not None
    tokens = chunk.counts(len(out)) if alone else cast(Any, cache).lengths
    lengths, ends = np.where(chunk.real[:, -1], 0, tokens), request.query[:, :, -1]
    if alone:
        (query, key, value), rules = straight_through(request.context, ends[:, :, None], key, value)
        found, lse = _attended(request, query[:, :, 0], _as_blocks(key, value), lengths, rules)
        if transient is not None:
            more = attend_transient(
                query,
                key,
                value,
                cache=CacheView.empty(key),
                past=torch.from_numpy(tokens - 1),
                valid=torch.ones(len(tokens), dtype=torch.int64),
                rules=rules,
                scores=request.scores,
                transient=transient,
            )
            found, _ = merged((found, lse), (more[0][:, :, 0], more[1][:, :, 0]))
        ends = found.to(out.dtype)
    else:
        ends = _decoded(request, ends, cast(Any, cache).view(), lengths, request.context.rules)
    padded = torch.from_numpy(lengths > 0).to(out.device)[:, None, None]
    return torch.cat((out[:, :, :-1], torch.where(padded, ends, out[:, :, -1])[:, :, None]), 2)


def _decoded(
    request: AttendRequest, query: torch.Tensor, view: CacheView, lengths: Ints, rules: RuleTable
) -> torch.Tensor:
    """Returns attention of one query a row over the layer's cache, selected tokens included, `[rows, heads, value_dim]`.

    `query`: `[rows, heads, head_dim]`. `lengths`: tokens of the rows, `[rows]`; 0, and the result is 0, for rows that are not
    asked for. `rules`: that the cache was made by.
    """
    found = _attended(request, query, view, lengths, rules)
    if not request.context.selects:
        return found[0]
    held = cast(PlanCacheLayer, request.cache).blocks_held()
    more = attend_selected(query, held.view_selected(), held.rules.selected(lengths), held.rules, request.scores)
    return merged(found, more)[0]


def _attended(
    request: AttendRequest, query: torch.Tensor, view: CacheView, lengths: Ints, rules: RuleTable
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_decoded`, over what is in `view` alone, with the log of the softmax's denominator, `[rows, heads]`.

    Of a layer without gates nobody asks for that: it may be all -inf.
    """
    selects, wide = request.context.selects, torch.promote_types(query.dtype, torch.float32)
    if not lengths.any():  # there may be no memory yet
        nothing = torch.full(query.shape[:2], -torch.inf, dtype=wide, device=query.device)
        return query.new_zeros(*query.shape[:2], request.value.shape[-1]), nothing
    backend = backend_with_gradients(query, *view.keys, *view.values, cached=True)
    if selects and query.requires_grad and torch.is_grad_enabled():
        backend = REFERENCE
    scores = request.scores
    if scores.by_query:  # of the last query, which is the one
        scores = scores._replace(sink_logits=cast(torch.Tensor, scores.sink_logits)[:, :, -1])
        backend = REFERENCE if request.learns else backend
    out, lse = beside_logits(
        lambda scores, with_lse: backend.decode(
            query, cache=view, lengths=torch.from_numpy(lengths), rules=rules, scores=scores, with_lse=with_lse
        ),
        scores,
        with_lse=selects,
    )
    return out, torch.full(query.shape[:2], -torch.inf, dtype=wide) if lse is None else lse


def _as_blocks(key: torch.Tensor, value: torch.Tensor) -> CacheView:
    """Returns a chunk as a cache that holds it from the position 0 on."""
    rows, heads, tokens, _ = key.shape
    width = -(-tokens // BLOCK)
    keys, values = (
        torch.nn.functional.pad(tensor, (0, 0, 0, width * BLOCK - tokens)).reshape(-1, BLOCK, tensor.shape[-1])
        for tensor in (key, value)
    )
    table = torch.arange(rows * heads * width, dtype=torch.int32, device="cpu").view(rows, heads, width)
    return CacheView([keys], [values], table)


ROUTES: tuple[Route[Any], ...] = (
    AllLayers(),
    OneLayer(),
    RingStep(),
    CacheStep(),
    Plain(),
)
"""All routes, in the order in which they are tried."""
_said: set[str] = set()


def first_route(request: Request) -> torch.Tensor | None:
    """Does what a request asks for by the first route that can; None where there is none."""
    for route in ROUTES:
        out = route.run(request) if route.takes is type(request) and route.can(request) else None
        if out is None:
            continue
        if request.tokens == 1 and request.whole is not None:
            request.whole.step_routes[route.name] += request.layers
            if route.name not in _said:
                _said.add(route.name)
                logger.info("decode steps go by the route: %s", route.name)
        return out
    return None


def dispatch(request: AttendRequest | LayerRequest) -> torch.Tensor:
    """Does what a request asks for; a decoder layer that no route can do is computed around its attention.

    Returns:
        Of a decoder layer `[rows, 1, hidden]`, of attention `[batch, tokens, heads, value_dim]`.
    """
    out = first_route(request)
    if out is None:  # plain attention can always
        assert isinstance(request, LayerRequest)
        out = request.finished(dispatch(request.attend_request()))
    return out
