"""What happens before the decoder and before each attention module of a model under a plan.

The hooks hold no state of a forward: the plan's part of a layer is fixed, what changes lives in the cache, and which tokens
are real goes through the model as its mask. So threads can share a model, and layers can be computed again for a backward pass.
`torch.compile` traces them; what depends on data is behind operators, see `ops`.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from moacompress.core.arrays import Bools, Ints
from moacompress.core.errors import UnsupportedError
from moacompress.kernels.derivatives import in_forward_mode
from moacompress.rules.plan import Plan
from moacompress.runtime.cache.plan_cache import PlanCache
from moacompress.runtime.compat.alternates import CACHE, CACHE_NAMES
from moacompress.runtime.compat.http_errors import refusal
from moacompress.runtime.decode.all_layers import RUN, Stack
from moacompress.runtime.decode.attention import MASK_SHAPE
from moacompress.runtime.hf.layer_order import LayerOrder
from moacompress.runtime.sharing.shared_keys import SHARED_KEYS, AnchorKeys

_LEFT_PADDED = "say which tokens are padding with a 2-D attention_mask, and leave position_ids out"


class DecoderHook:
    """Checks the inputs of a forward, brings the cache and tells it which tokens are real."""

    def __init__(self, plan: Plan, decoder: torch.nn.Module, order: LayerOrder, stack: Stack | None = None) -> None:
        self.order, self.stack = order, stack
        self.set_plan(plan)
        parameters = inspect.signature(type(decoder).forward).parameters
        self.names = [name for name in parameters if name not in ("self", "args", "kwargs")]
        self.cache_name = next((name for name in CACHE_NAMES if name in self.names), CACHE)

    def set_plan(self, plan: Plan) -> None:
        """Goes by another plan from now on, such as that of a rank's KV heads."""
        self.plan, self.plan_key = plan, plan.key()

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Runs before the decoder; see `torch.nn.Module.register_forward_pre_hook`."""
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        _check_rest(module, kwargs)
        self.order.check(module)
        if self.plan.shares:
            kwargs[SHARED_KEYS] = AnchorKeys(torch.is_grad_enabled())
        name = self.cache_name
        for other in CACHE_NAMES:  # a cache under a name of another version would be swallowed
            if other != name and kwargs.get(other) is not None:
                kwargs[name] = kwargs.pop(other)
        cache = check_cache(kwargs.get(name), self.plan_key)
        if cache is None and self._wants_cache(module, kwargs):
            cache = kwargs[name] = self._new_cache()
        fed = next((n for n in ("input_ids", "inputs_embeds") if kwargs.get(n) is not None), None)
        if fed is None:
            return (), kwargs  # the decoder has its own words for that
        if isinstance(kwargs.get("attention_mask"), dict):
            kwargs["attention_mask"] = _of_all_layers(kwargs["attention_mask"], cache)
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if torch.compiler.is_compiling():
            handle = None if cache is None else cache.handle
            kwargs[fed] = torch.ops.moacompress.begin(kwargs[fed], handle, as_tensor(mask), as_tensor(positions))
            return (), kwargs
        if in_forward_mode():
            raise UnsupportedError(
                "a compressed model has no derivatives in forward mode (torch.func.jvp, jacfwd), only gradients"
            )
        rows, tokens = kwargs[fed].shape[:2]
        real = begin(cache, mask, positions, rows, tokens)
        if real is None or real[:, real.shape[1] - tokens :].all():
            kwargs.pop("attention_mask", None)
            if tokens == 1 and self.stack is not None and cache is not None:
                kwargs[RUN] = self.stack.begin(module, cache)
        return (), kwargs

    @torch.compiler.disable(
        reason="a cache cannot be made in a compiled graph: pass one, " + CACHE + "=PlanCache(plan)"
    )  # type: ignore[untyped-decorator]
    def _new_cache(self) -> PlanCache:
        return PlanCache(self.plan)

    @staticmethod
    def _wants_cache(module: Any, kwargs: dict[str, Any]) -> bool:
        wanted = kwargs.get("use_cache")
        if wanted is None:
            wanted = getattr(module.config, "use_cache", False)
        return bool(wanted) and not (getattr(module, "gradient_checkpointing", False) and module.training)


def begin(cache: PlanCache | None, mask: Any, positions: Any, rows: int, tokens: int) -> Bools | None:
    """Checks the inputs of a forward, and tells the cache what it will have added when it ends.

    Returns:
        Which tokens are real, as `read_mask`.

    Raises:
        UnsupportedError: a mask or positions that a plan cannot be kept with, or a cache of an interrupted forward.
    """
    if cache is not None:
        cache.check_whole()
    real = read_mask(mask, cache, rows, tokens)
    trusted = cache is not None and cache.trusts(positions)
    last = None if trusted else _check_positions(positions, real, cache, rows, tokens)
    if cache is not None:
        cache.expect(real, last, tokens)
    return real


def _of_all_layers(masks: dict[str, Any], cache: PlanCache | None) -> torch.Tensor | None:
    """Returns the mask of a forward, where the model around the decoder has made one for each type of layer.

    Raises:
        UnsupportedError: they are not that.
    """
    first = next(iter(masks.values()), None)
    for mask in masks.values():
        same = mask is first or (
            isinstance(mask, torch.Tensor) and isinstance(first, torch.Tensor) and mask.equal(first)
        )
        if not same or (mask is not None and mask.ndim != 2):
            raise UnsupportedError(MASK_SHAPE.format("that differs between layers"))
    past = cache.get_seq_length() if cache is not None else 0
    if first is None or not past:
        return first
    assert cache is not None
    seen = torch.from_numpy(cache.seen(len(first))).to(first.device, first.dtype)
    return torch.cat([seen, first], dim=1)


def as_tensor(given: Any) -> torch.Tensor | None:
    """Returns a mask or position ids for an operator.

    Raises:
        UnsupportedError: something else than a tensor.
    """
    if given is None or isinstance(given, torch.Tensor):
        return given
    raise UnsupportedError(MASK_SHAPE.format(type(given).__name__))


def check_cache(cache: Any, plan_key: str) -> PlanCache | None:
    """Returns the cache if it is one that this plan can use.

    Raises:
        UnsupportedError: another kind of cache, or one of another plan.
    """
    if cache is None or (isinstance(cache, PlanCache) and cache.plan_key == plan_key):
        return cache
    if isinstance(cache, PlanCache):
        raise UnsupportedError("the cache belongs to another plan; start a new one for this model")
    raise UnsupportedError(
        f"a compressed model brings its own cache and cannot use a {type(cache).__name__}; pass no cache, or the one that "
        "the model returned"
    )


def read_mask(mask: Any, cache: PlanCache | None, rows: int, tokens: int) -> Bools | None:
    """Returns which tokens are real, those in the cache first, bool `[rows, columns]`; None where all are.

    `mask`: what the caller gave, or None: then all tokens of this forward are real.

    Raises:
        UnsupportedError: a mask of another shape, or one that takes back what it said of tokens that are in the cache.
    """
    past = cache.get_seq_length() if cache is not None else 0
    seen = cache.seen(rows) if cache is not None and cache.real is not None else None
    if mask is None:
        return None if seen is None else np.concatenate([seen, np.ones((rows, tokens), np.bool_)], axis=1)
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        raise UnsupportedError(
            MASK_SHAPE.format(tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__)
        )
    if tuple(mask.shape) != (rows, past + tokens):
        raise UnsupportedError(
            f"the attention mask has the shape {tuple(mask.shape)} and should have ({rows}, {past + tokens}): {past} tokens in "
            f"the cache and {tokens} new ones"
        )
    real: Bools = (mask.detach() != 0).cpu().numpy()
    if not (real[:, :past].all() if seen is None else np.array_equal(real[:, :past], seen)):
        raise UnsupportedError(
            "the attention mask says otherwise of tokens that are in the cache than when they were fed; a compressed cache "
            "cannot hide or show them later, so start a new one"
        )
    return None if real.all() else real


def _check_positions(
    positions: Any, real: Bools | None, cache: PlanCache | None, rows: int, tokens: int
) -> Ints | None:
    """Refuses position ids that do not count on from one real token of a row to the next, where no padding is between them.

    Returns:
        The last position of every row, `[rows]`, -1 where it is not known; None where none is.
    """
    if positions is None:
        return _counted_positions(cache, real, rows, tokens)
    message = (
        "position_ids that do not count on (packed sequences, gaps, or tokens that the cache has already) are not "
        "supported by a compressed model; "
    )
    if not isinstance(positions, torch.Tensor) or positions.ndim != 2 or positions.shape[1] != tokens:
        raise UnsupportedError(message + _LEFT_PADDED)
    last = cache.last_position if cache is not None else None
    if (
        tokens == 1 and real is None and positions.shape[0] in (1, rows)
    ):  # a decode step: numpy takes longer for it than this
        fed = [position for (position,) in positions.tolist()] * (rows // positions.shape[0])
        if last is not None and any(0 <= end != now - 1 for end, now in zip(last.tolist(), fed, strict=True)):
            raise UnsupportedError(message + _LEFT_PADDED)
        return np.array(fed, np.int64)
    found = np.broadcast_to(positions.detach().cpu().numpy(), (rows, tokens))
    ends = np.full(rows, -1, np.int64) if last is None else last.copy()
    for row in range(rows):
        columns = np.arange(tokens)
        if real is not None:
            columns = columns[real[row, real.shape[1] - tokens :]]
        if not len(columns):
            ends[row] = -1
            continue
        steps, gaps = np.diff(found[row, columns]), np.diff(columns)
        start = last is None or last[row] < 0 or found[row, columns[0]] == last[row] + 1
        if not ((steps == 1) | (gaps > 1)).all() or not start:
            raise UnsupportedError(message + _LEFT_PADDED)
        # a row that ends in padding continues from that, wherever it is put
        ends[row] = found[row, -1] if columns[-1] == tokens - 1 else -1
    return ends


def _counted_positions(cache: PlanCache | None, real: Bools | None, rows: int, tokens: int) -> Ints | None:
    """Returns the last position of every row where the caller gives none, `[rows]`: models count the columns themselves.

    None where that is not known: with padding, and behind tokens that stand elsewhere.
    """
    if cache is None or real is not None:
        return None
    past, last = cache.get_seq_length(), cache.last_position
    if past and (last is None or (last != past - 1).any()):
        return None
    return np.full(rows, past + tokens - 1, np.int64)


def _check_rest(module: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions") or (
        kwargs.get("output_attentions") is None and getattr(module.config, "output_attentions", False)
    ):
        raise refusal("output_attentions is not supported: a compressed model never makes the whole matrix")
    if any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k")):
        raise UnsupportedError("packed sequences (cu_seq_lens) are not supported by a compressed model")
    if getattr(module.config, "is_causal", True) is False or kwargs.get("is_causal") is False:
        raise UnsupportedError("is_causal=False is not supported: a plan is made for causal attention")
