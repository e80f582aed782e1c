"""Decoder layers whose decode step is computed in one compiled call in place of their own forward.

A few decoder layers of transformers are known here, letter by letter: a norm, attention with plain linear layers and rotary
embeddings by halves, a norm, a gated feed-forward. Under a plan their class is a subclass, which asks for a step by its weights
where a forward has one token of a few rows and no gradients, and otherwise is the layer that it was. A layer that something
else has changed (adapters in place of its linear layers, hooks on its parts) runs its own forward. Compiling, pickling and
sharding by class names understand a subclass; they do not understand a forward in the module's own dictionary.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from moacompress.kernels.arguments import LayerWeights, NormAndMlpWeights, Projections, Rotary
from moacompress.kernels.dispatch import capabilities_for
from moacompress.kernels.weight_blocks import NATIVE
from moacompress.models.block_layers import BlockLinear, kind_of
from moacompress.runtime.cache.plan_cache import PlanCache
from moacompress.runtime.compat import private_names
from moacompress.runtime.compat.alternates import CACHE
from moacompress.runtime.compat.private_names import FAMILIES, FEED_FORWARD, NORMS, PROJECTIONS
from moacompress.runtime.decode.all_layers import (
    GLOBAL_HOOKS,
    REPLACEMENTS,
    RUN,
    PatchPoint,
    SealedLayers,
    StackStep,
    are_foreign,
    are_unpatched,
    is_capturing,
    kernel_funcs,
)
from moacompress.runtime.decode.context import AttentionHook, LayerCall
from moacompress.runtime.decode.routes import dispatch, first_route
from moacompress.runtime.decode.step_requests import LayerRequest
from moacompress.runtime.linear import KernelLinear, has_few_rows, is_kernel_compatible
from moacompress.runtime.sharing.projections import DroppedProjection

PREFIX = "Fused"
_MODULE_CALL = nn.Module.__call__
PLAIN = (nn.Linear, KernelLinear, BlockLinear)
SILU = tuple({type(private_names.resolve(private_names.ACTIVATIONS)[name]) for name in ("silu", "swish")})
NOTHING = object()
"""What nothing is: in the place of a part that is not what is known."""


class _LayerParts(NamedTuple):
    """A decoder layer whose step can be asked for: its attention, what that is handed, and the layer's weights."""

    attention: Any
    call: LayerCall
    weights: LayerWeights


class _FusedLayer:
    """What a fused decoder layer's class puts before the layer's own.

    Attributes:
        known: the classes of its attention, feed-forward and norms.
        patch_points: the forward of the layer's own class, of those and of what they are made of, and what turns queries and
            keys.
    """

    known: tuple[type[nn.Module], ...]
    patch_points: tuple[PatchPoint, ...]

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """As the layer's own."""
        module, rotary, run = cast(Any, self), cast(Any, kwargs.get("position_embeddings")), kwargs.pop(RUN, None)
        if isinstance(run, StackStep) and not args and not torch.compiler.is_compiling():
            out = run.step(module, hidden_states, attention_mask, rotary, first_route)
            if out is not None:
                return out
        layer = None if attention_mask is not None else _layer(module, hidden_states, rotary, kwargs)
        if layer is None:
            whole = super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
            return cast(torch.Tensor, whole)
        context, cache, scaling = layer.call.context, cast(PlanCache, layer.call.cache), layer.attention.scaling
        projections, norms_and_mlp, _ = layer.weights
        if torch.compiler.is_compiling():
            rest = (*norms_and_mlp, *rotary, cache.handle, context.rules.columns, context.layer, scaling)
            return cast(torch.Tensor, torch.ops.moacompress.step_layer(hidden_states, *projections, *rest))
        return dispatch(LayerRequest(context, cache, hidden_states, Rotary(*rotary), scaling, layer.weights))


def _read(
    layers: Iterable[Any], hidden: torch.Tensor, kinds: tuple[type[nn.Module], ...]
) -> tuple[list[Any], list[Any], list[int]] | None:
    """Returns weights and biases of linear layers, and types of blocks (none where all are native).

    None where the compiled kernels cannot use them.

    Every step asks this of every layer, so it goes by the dictionaries of a module, which take half the time.
    """
    if not has_few_rows(hidden) or any(GLOBAL_HOOKS):
        return None
    weights, biases, codes = [], [], []
    for layer in layers:
        if type(layer) not in kinds or _is_touched(layer):
            return None
        own = layer._parameters
        weight, bias = own.get("weight"), own.get("bias")
        kind = kind_of(layer)
        if not is_kernel_compatible(weight, hidden, kind) or not (bias is None or is_kernel_compatible(bias, hidden)):
            return None
        weights.append(weight)
        codes.append(NATIVE if kind is None else kind.code)
        if bias is not None:
            biases.append(bias)
    return weights, biases, codes if any(codes) else []


def _fits(
    module: Any, hidden: torch.Tensor, rotary: Any, call: Any, weights: Iterable[torch.Tensor], among_all: bool
) -> bool:
    """Whether attention's forward is one that can be asked for by the weights of its projections.

    `among_all`: whether all layers are asked for together, those too that share attention.
    """
    if not isinstance(call, LayerCall) or call.cache is None or rotary is None or module.training:
        return False
    rows, tokens, _ = hidden.shape
    if tokens != 1 or not rows:
        return False
    head_dim, (cos, sin) = module.head_dim, rotary
    if torch.is_autocast_enabled(hidden.device.type) or cos.dtype != hidden.dtype or sin.dtype != hidden.dtype:
        return False
    # what does not go together is for the layer itself to refuse
    sliding = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    context, (queries, keys, values) = call.context, (weight.shape[0] for weight in weights)
    return (
        sliding in (None, context.native_window)
        and (among_all or not context.takes_part)
        and (among_all or not context.selects)
        and module.is_causal
        and cos.shape[-1] == sin.shape[-1] == head_dim
        and keys == (0 if context.share is not None else context.kv_heads * head_dim)
        and values % context.kv_heads == 0
        and queries % (context.kv_heads * head_dim) == 0
    )


def _layer(
    module: Any, hidden: torch.Tensor, rotary: Any, kwargs: dict[str, Any], among_all: bool = False
) -> _LayerParts | None:
    """Returns the parts of a decoder layer, or None where its step cannot be asked for; `kwargs` has the cache."""
    if not capabilities_for(hidden).step_layer:
        return None
    parts = module._modules
    attention, mlp, norms = parts.get("self_attn"), parts.get("mlp"), [parts.get(name) for name in NORMS]
    if module.training or tuple(type(part) for part in (attention, mlp, *norms)) != module.known:
        return None
    if not are_unpatched(module.patch_points):
        return None
    own, feed_forward = attention._modules, mlp._modules
    names = (*((own, name) for name in (*PROJECTIONS, "o_proj")), *((feed_forward, name) for name in FEED_FORWARD))
    linears, activation = [parts.get(name) for parts, name in names], feed_forward.get("act_fn")
    if activation is None or None in linears:
        return None
    others = (mlp, activation, *norms, *kernel_funcs(attention))
    if _is_touched(attention, hooked_before=True) or any(map(_is_touched, others)):
        return None
    found = _read(linears, hidden, (*PLAIN, DroppedProjection) if among_all else PLAIN)
    if found is None:
        return None
    weights, biases, kinds = found
    if len(biases) not in (0, 3) or any(part._parameters["bias"] is not None for part in linears[3:]):
        return None
    scales, eps = [norm._parameters["weight"] for norm in norms], norms[0].variance_epsilon
    if type(activation) not in SILU or norms[1].variance_epsilon != eps:
        return None
    call = _call(attention, kwargs) if all(is_kernel_compatible(scale, hidden) for scale in scales) else None
    if call is None or not _fits(attention, hidden, rotary, call, weights[:3], among_all):
        return None
    projections = Projections(weights[:3], biases, kinds[:3], call.context.centre)
    gate: tuple[torch.Tensor, ...] = ()
    if call.context.selects:
        if _is_touched(own["gate"]):
            return None
        probe = own["gate"]._parameters
        gate = probe["weight"], probe["bias"]
        if not all(is_kernel_compatible(part, hidden) for part in gate):
            return None
    return _LayerParts(
        attention, call, LayerWeights(projections, NormAndMlpWeights(scales, eps, weights[3:], kinds[3:]), gate)
    )


def _call(attention: Any, kwargs: dict[str, Any]) -> LayerCall | None:
    """Returns what the plan's hook hands to a layer's attention; None where another one is there too."""
    hooks = list(attention._forward_pre_hooks.values())
    if len(hooks) != 1 or not isinstance(hooks[0], AttentionHook):
        return None
    return hooks[0].call(attention, kwargs)


def _is_touched(module: Any, hooked_before: bool = False) -> bool:
    """Whether something runs around a module, or in its place; `hooked_before`: hooks before it are looked at elsewhere."""
    own, hooks = module.__dict__, module._forward_hooks
    hooked = (hooks and (is_capturing() or are_foreign(hooks))) or (module._forward_pre_hooks and not hooked_before)
    return bool(hooked or any(name in own for name in REPLACEMENTS))


def read_layers(layers: tuple[Any, ...], hidden: torch.Tensor, rotary: Any, cache: PlanCache) -> SealedLayers | None:
    """Reads decoder layers for a step through all of them; None where one of them cannot take part.

    `hidden`: `[rows, 1, hidden]`, what comes into the first.
    """
    sealed_layers = SealedLayers(layers)
    numbers, biased = set(), set()
    for module in layers:
        untouched = are_fused((module,)) and not _is_touched(module)
        layer = _layer(module, hidden, rotary, {CACHE: cache}, among_all=True) if untouched else None
        if layer is None:
            return None
        sealed_layers.weights.append(layer.weights)
        sealed_layers.contexts.append(layer.call.context)
        projections, norms_and_mlp, _ = layer.weights
        numbers.add((norms_and_mlp.eps, layer.attention.head_dim, layer.attention.scaling))
        biased.add(len(projections.biases))
    if len(numbers) != 1 or len(biased) != 1:
        return None
    _, head_dim, scaling = numbers.pop()
    sealed_layers.seal(head_dim, scaling)
    return sealed_layers


def are_fused(layers: Iterable[nn.Module]) -> bool:
    """Returns whether there are decoder layers, and the class of every one is a fused one, not one made of it."""
    kinds = [type(layer) for layer in layers]
    return bool(kinds) and all(
        issubclass(kind, _FusedLayer) and globals().get(kind.__qualname__) is kind for kind in kinds
    )


def fuse(module: nn.Module) -> bool:
    """Makes the class of a decoder layer a fused one, if it is known; `unfuse` takes it back."""
    own = type(module)
    if not _is_known(own.__module__, own.__qualname__) or not _is_from(own, own.__module__):
        return False
    module.__class__ = _fused(own)
    return True


def unfuse(module: nn.Module) -> None:
    """Gives a layer its own class back; any other is left as it is."""
    own = _own(type(module))
    if own is not type(module):
        module.__class__ = own


def _own(kind: type[nn.Module]) -> type[nn.Module]:
    return kind.__bases__[1] if issubclass(kind, _FusedLayer) else kind


def _is_known(module: str, name: str) -> bool:
    """Whether a class is a decoder layer of transformers that is known."""
    return any(
        (module, name) == (f"transformers.models.{family}.modeling_{family}", f"{prefix}DecoderLayer")
        for family, prefix in FAMILIES.items()
    )


def _is_from(kind: type[nn.Module], home: str) -> bool:
    """Whether a class, and what it does in a forward, is written in a module: others replace the one or the other."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return kind.__module__ == home and code is not None and code.co_filename == sys.modules[home].__file__


def _forward_of(kind: type[nn.Module]) -> PatchPoint:
    return PatchPoint(kind, "forward", kind.forward if _is_from(kind, kind.__module__) else NOTHING)


def _calls(kind: type[nn.Module], call: Any = _MODULE_CALL) -> tuple[PatchPoint, ...]:
    """Returns what runs where a module of a class is called: its forward, and `call` around that."""
    return _forward_of(kind), PatchPoint(kind, "__call__", call)


def _layer_call() -> Any:
    """Returns what is around a decoder layer's forward: before 5.23 transformers has a call of its own there."""
    found = private_names.resolve(private_names.LAYER_CALL)
    home = sys.modules[private_names.LAYER_CALL.rpartition(".")[0].rpartition(".")[0]]
    return found if found is _MODULE_CALL or found.__code__.co_filename == home.__file__ else NOTHING


def _function_of(module: Any, name: str) -> PatchPoint:
    """Returns a function of a module's own, which others replace there by their kernels.

    The package `kernels` puts a module in its place that runs the function.
    """
    found = function = getattr(module, name, None)
    if isinstance(found, nn.Module):
        function = inspect.getclosurevars(type(found).forward).nonlocals.get("func")
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    own = code is not None and code.co_filename == module.__file__
    return PatchPoint(module, name, found if own else NOTHING)


def _fused(own: type[nn.Module]) -> type[nn.Module]:
    name = PREFIX + own.__name__
    known: type[nn.Module] | None = globals().get(name)
    if known is not None:
        return known
    # FSDP and accelerate look for the layers of a model by the name of their class; pickle goes by the qualified one
    made: Any = type(own.__name__, (_FusedLayer, own), {"__module__": __name__, "__qualname__": name})
    home, prefix = sys.modules[own.__module__], own.__name__.removesuffix("DecoderLayer")
    kinds = [getattr(home, prefix + part) for part in ("Attention", "MLP", "RMSNorm")]
    attention, mlp, norm = kinds
    written_there = all(_is_from(kind, own.__module__) for kind in kinds)
    made.known = (attention, mlp, norm, norm) if written_there else ()
    # a pickled layer may come into a process where its class has been given another forward: that is not one to stand in for
    made.patch_points = (
        *_calls(own, _layer_call()),
        *(part for kind in (*kinds, *SILU) for part in _calls(kind)),
        *map(_forward_of, PLAIN),
        *(_function_of(home, name) for name in private_names.ROTARY),
        PatchPoint(made, "forward", made.forward),
    )
    globals()[name] = made
    return cast("type[nn.Module]", made)


def __getattr__(name: str) -> Any:
    """Makes the class of a pickled layer in a process that has fused none yet."""
    for family in FAMILIES:
        module = f"transformers.models.{family}.modeling_{family}"
        own = name.removeprefix(PREFIX)
        if name.startswith(PREFIX) and _is_known(module, own):
            return _fused(getattr(importlib.import_module(module), own))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
