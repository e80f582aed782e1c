"""A decode step through all decoder layers in one compiled call.

Between two layers' calls a processor runs Python that it has not seen since the layer before, while weights went through its
caches; a small model's step has much of that. So where every layer could make the call of `fused` by itself, the first one
makes one call for all, and the others return what they get.

Every step asks whether anything of what the layers are made of has been changed. What was read is kept, by the kernels too, so
that asking is a comparison.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain, repeat
from operator import is_, itemgetter
from typing import Any, NamedTuple, cast

import torch
from torch.utils.hooks import RemovableHandle

from moacompress.core.errors import UnsupportedError
from moacompress.kernels.arguments import LayerWeights, Rotary
from moacompress.kernels.bound import WeightsMoved
from moacompress.kernels.dispatch import backend_for, capabilities_for, few_rows
from moacompress.runtime.cache.layer_cache import PlanCacheLayer
from moacompress.runtime.cache.plan_cache import PlanCache
from moacompress.runtime.compat import private_names
from moacompress.runtime.decode.context import LayerContext
from moacompress.runtime.decode.step_requests import StackRequest

RUN = "moacompress_run"
"""Keyword under which a `StackStep` reaches the decoder layers."""
GLOBAL_HOOKS = (
    private_names.resolve(private_names.FORWARD_HOOKS),
    private_names.resolve(private_names.FORWARD_PRE_HOOKS),
)
"""Hooks on all modules there are; both empty, mostly."""
_CAPTURING = private_names.resolve(private_names.OUTPUT_CAPTURING).__globals__
_collector = private_names.resolve(private_names.ACTIVE_COLLECTOR)
REPLACEMENTS = ("forward", private_names.COMPILED_CALL)
"""What a module has in its own dictionary where something else is run in its place."""


def kernel_funcs(module: torch.nn.Module) -> Iterable[torch.nn.Module]:
    """Returns what stands in a module for functions that the package `kernels` may run something else for."""
    found: dict[str, torch.nn.Module] = module.__dict__.get(private_names.KERNEL_FUNCS, {})
    return found.values()


def is_capturing() -> bool:
    """Returns whether the running forward captures hidden states."""
    return bool(_collector.get())


def are_foreign(hooks: dict[int, Any]) -> bool:
    """Returns whether some forward hook of a module is not one of transformers' that capture hidden states.

    Those stay on the layers after the first forward that is asked for hidden states, and do nothing in others.
    """
    return not all(getattr(hook, "__globals__", None) is _CAPTURING for hook in hooks.values())


class PatchPoint(NamedTuple):
    """Something that a fused layer stands in for, or leans on: as it was when the layer's class was made.

    Attributes:
        home: the class or the module where it is found.
        name: under which.
        was: what was found; something else where that was not what is known.
    """

    home: Any
    name: str
    was: Any


def are_unpatched(parts: Iterable[PatchPoint]) -> bool:
    """Returns whether nobody has put something else in the place of a part: another forward, another function."""
    return all(getattr(home, name, None) is was for home, name, was in parts)


@dataclass
class SealedLayers:
    """What all decoder layers are made of, as one after the other was read; and how to tell that it still is.

    Attributes:
        layers: the decoder layers.
        contexts: their parts of the plan.
        weights: of each layer.
        captured: whether hooks that capture hidden states are on some module.
    """

    layers: tuple[Any, ...]
    contexts: list[LayerContext] = field(default_factory=list)
    weights: list[LayerWeights] = field(default_factory=list)

    def seal(self, head_dim: int, scaling: float) -> None:
        """Gives what was read to the backend, and takes note of everything that `holds` compares."""
        one = self.weights[0].norms_and_mlp.norms[0]  # weights may be in blocks
        rules = [context.rules for context in self.contexts]
        self._backend = backend_for(one)
        shares = tuple(context.share for context in self.contexts)
        self.bound = self._backend.read_layers(
            self.weights, head_dim=head_dim, rules=rules, scaling=scaling, shares=shares
        )
        self._dtype = one.dtype
        self._hooks: list[dict[int, Any]] = [*GLOBAL_HOOKS]
        self._modules: list[torch.nn.Module] = []
        self._own: list[dict[str, Any]] = []
        self._watched: dict[tuple[Any, ...], list[dict[Any, Any]]] = {}
        for layer in self.layers:
            attention, mlp, norms = layer.self_attn, layer.mlp, (layer.input_layernorm, layer.post_attention_layernorm)
            inner = (*attention._modules.values(), *kernel_funcs(attention), *mlp._modules.values())
            for module in (layer, attention, mlp, *norms, *inner):
                self._modules.append(module)
                self._own.append(module.__dict__)
                self._hooks.append(module._forward_hooks)
                if module is not attention:
                    self._hooks.append(module._forward_pre_hooks)
                for held in (module._modules, module._parameters):
                    self._watch(held, *held)
            self._watch(attention.__dict__, "training", "scaling", "is_causal", "layer_idx")
            self._watch(attention._forward_pre_hooks, *attention._forward_pre_hooks)
            self._watch(attention.config.__dict__, private_names.IMPLEMENTATION)
            for norm in norms:
                self._watch(norm.__dict__, "variance_epsilon")
        self._kinds = [*map(type, self._modules)]
        self._patch_points = {part for layer in self.layers for part in layer.patch_points}
        self._expected = [*self._now()]
        self._hooks_made, self.captured = RemovableHandle.next_id, any(self._hooks)

    def _watch(self, held: dict[Any, Any], *names: Any) -> None:
        if names:
            self._watched.setdefault(names, []).append(held)

    def _now(self) -> Iterator[Any]:
        """Goes through what is watched: the names are few and near, where the dictionaries of a model are many and far."""
        for names, all_held in self._watched.items():
            if len(names) == 1:
                yield from map(itemgetter(*names), all_held)
            else:
                yield from chain.from_iterable(map(itemgetter(*names), all_held))

    def holds(self, layers: tuple[Any, ...], hidden: torch.Tensor) -> bool:
        """Whether the layers are those that were read, and nothing about them has changed; not whether weights were moved."""
        if layers != self.layers or hidden.dtype != self._dtype or backend_for(hidden) is not self._backend:
            return False
        made = RemovableHandle.next_id  # how many hooks anything ever got: most steps need not look for them
        if made != self._hooks_made:
            if any(map(are_foreign, filter(None, self._hooks))) or any(
                len(layer.self_attn._forward_pre_hooks) != 1 for layer in layers
            ):
                return False
            self.captured, self._hooks_made = any(self._hooks), made  # in this order: threads share the bound layers
        if any(any(map(dict.__contains__, self._own, repeat(name))) for name in REPLACEMENTS):
            return False
        if not all(map(is_, map(type, self._modules), self._kinds)) or not are_unpatched(self._patch_points):
            return False
        try:
            return all(map(is_, self._now(), self._expected))
        except KeyError:
            return False

    @property
    def trained(self) -> bool:
        """Whether some weight has gradients."""
        return any(
            tensor.requires_grad
            for projections, norms_and_mlp, _ in self.weights
            for tensor in (*projections.weights, *projections.biases, *norms_and_mlp.norms, *norms_and_mlp.weights)
        )


class SealedCaches:
    """The caches of all layers as the kernels have read them; the pools' locks are held while it is made and used."""

    def __init__(self, sealed_layers: SealedLayers, caches: list[PlanCacheLayer]) -> None:
        # a cache that is kept does not keep the weights
        self._sealed_layers, self._caches, self._lag = weakref.ref(sealed_layers), caches, caches[0].lag
        self.bound = sealed_layers.bound.read_caches([cache.state(self._lag) for cache in caches])
        self._arrays = [cache.arrays() for cache in caches]

    def holds(self, sealed_layers: SealedLayers, caches: list[PlanCacheLayer]) -> bool:
        """Whether it is of these, and nothing of them has been replaced since."""
        if sealed_layers is not self._sealed_layers() or caches is not self._caches or caches[0].lag != self._lag:
            return False
        return all(all(map(is_, cache.arrays(), known)) for cache, known in zip(caches, self._arrays, strict=True))

    def read_again(self, layer: int) -> None:
        """Reads the cache of one layer, by its index, again."""
        cache = self._caches[layer]
        self.bound.read_again(layer, cache.blocks_held().state(self._lag))
        self._arrays[layer] = cache.arrays()


class Stack:
    """Remembers how the decoder layers of a model were read last.

    `read`: reads layers for a step: `fused.read_layers`.
    """

    def __init__(self, read: Callable[..., SealedLayers | None]) -> None:
        self._read = read
        self._last: SealedLayers | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def begin(self, decoder: Any, cache: PlanCache) -> StackStep | None:
        """Returns what a forward of one real token a row hands to its layers; None where not all layers take part."""
        layers = tuple(decoder.layers._modules.values())
        return StackStep(self, layers, cache) if len(layers) == decoder.config.num_hidden_layers else None

    def sealed_layers(self, request: StackRequest) -> SealedLayers | None:
        """Returns what the layers are made of, or None where they cannot make one call."""
        last, hidden = self._last, request.hidden
        if last is None or not last.holds(request.modules, hidden):
            last = self._last = self._read(request.modules, hidden, request.rotary, request.whole)
        if last is None or (last.captured and is_capturing()):
            return None
        if torch.is_grad_enabled() and (hidden.requires_grad or last.trained):
            return None
        return last

    def forget(self) -> None:
        """Has the layers read again."""
        self._last = None


class StackStep:
    """One forward of one token a row through the decoder layers."""

    def __init__(self, stack: Stack, layers: tuple[Any, ...], cache: PlanCache) -> None:
        self._stack, self._layers, self._cache = stack, layers, cache
        self._out: torch.Tensor | None = None

    def step(
        self,
        layer: Any,
        hidden: torch.Tensor,
        attention_mask: Any,
        rotary: Any,
        dispatch: Callable[[StackRequest], torch.Tensor | None],
    ) -> torch.Tensor | None:
        """Returns what a layer's forward returns, or None where the layer is to do its part by itself.

        `hidden`: `[rows, 1, hidden]`. `dispatch`: does the step of all layers; None where it cannot.
        """
        if self._out is not None:
            if hidden is not self._out:
                self._cache.layers[0].stepping = True
                raise UnsupportedError(
                    "something changed the hidden states between two decoder layers, whose step is made in one call; use hooks "
                    "on the layers, then each does its part by itself"
                )
            return hidden
        if not self._layers or layer is not self._layers[0]:
            return None
        if attention_mask is None and rotary is not None:
            self._out = dispatch(StackRequest(self._stack, self._layers, self._cache, hidden, Rotary(*rotary)))
        if self._out is None:
            self._layers = ()
        return self._out


def can_step_all(request: StackRequest) -> bool:
    """Whether a step through all layers is worth a closer look: few rows, one dtype, a backend that can, caches with memory."""
    hidden = request.hidden
    if hidden.shape[1] != 1 or not 0 < hidden.shape[0] <= few_rows(hidden) or not capabilities_for(hidden).stack:
        return False
    if torch.is_autocast_enabled(hidden.device.type) or any(part.dtype != hidden.dtype for part in request.rotary):
        return False
    return request.whole.sealed_layers is not None or _can_step(_caches(request), hidden)


def step_all(request: StackRequest) -> torch.Tensor | None:
    """Makes the step through all layers; `[rows, 1, hidden]`, or None, and nothing is done, where it cannot after all."""
    stack, hidden, whole = request.stack, request.hidden, request.whole
    caches = _caches(request)
    while True:
        sealed_layers = stack.sealed_layers(request)
        if sealed_layers is None:
            return None
        with _all_locked(caches):  # forks in other threads replace what is read when they make room in the pools
            known = whole.sealed_layers
            if known is None or not known.holds(sealed_layers, caches):
                if not _can_step(caches, hidden):
                    return None
                known = whole.sealed_layers = SealedCaches(sealed_layers, caches)
            elif hidden.shape[0] != len(caches[0].lengths):
                return None  # for the layers to refuse
            caches[0].stepping = True  # an error or an interrupt in the midst of it leaves a cache that is refused
            try:
                out = _step_bound(known, caches, hidden, request.rotary)
            except WeightsMoved:
                out = None
            caches[0].stepping = False
        if out is not None:
            return out
        stack.forget()


def _caches(request: StackRequest) -> list[PlanCacheLayer]:
    # those of layers that share attention are as good: what is asked of them here they have
    return cast("list[PlanCacheLayer]", request.whole.layers)


def _can_step(caches: list[PlanCacheLayer], hidden: torch.Tensor) -> bool:
    return all(cache.can_step_rows(hidden) for cache in caches)


def _step_bound(
    known: SealedCaches, caches: list[PlanCacheLayer], hidden: torch.Tensor, rotary: Rotary
) -> torch.Tensor:
    """Makes the call, and again where it lacks room.

    Raises:
        WeightsMoved: nothing is done, and the weights are to be read again.
    """
    done = 0
    while True:
        try:
            out, now, shortfall = known.bound.step(hidden, rotary, done)
        except WeightsMoved:
            if done:
                raise UnsupportedError(
                    "a weight was given other memory in the midst of a step, by another thread; start a new cache"
                ) from None
            raise
        for cache in caches[done:now]:
            cache.columns += 1
        if shortfall is None:
            return out
        if now > done:
            hidden, done = out, now
        caches[done].blocks_held().allocate(shortfall)
        known.read_again(done)


@contextmanager
def _all_locked(caches: list[PlanCacheLayer]) -> Iterator[None]:
    """Holds the locks of all layers' pools, which forks of a cache in other threads take in the same order."""
    with ExitStack() as held:
        for cache in caches:
            held.enter_context(cache.lock)
        yield
