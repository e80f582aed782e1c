"""Reads a prompt once with the dense model, and keeps what every layer attended with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from moacompress.core.errors import ModelError
from moacompress.evaluation.eviction.attention import Attending, KeptCache, WholeCache, attended_by, attending
from moacompress.evaluation.eviction.baseline import LayerReading, PromptReading
from moacompress.kernels.centred_keys import centred
from moacompress.kernels.reference.rounding import rounded
from moacompress.models.modules import attention_modules, given_hidden
from moacompress.models.placement import input_device
from moacompress.rules.formats import NATIVE, find_format
from moacompress.runtime.compat.alternates import CACHE_NAMES, cache_argument

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class DenseReading:
    """A prompt as the dense model read it, for any number of ways to evict.

    Attributes:
        model: the dense model.
        tokenizer: its tokenizer.
        ids: the prompt.
        layers: what each layer attended with, in the model's dtype.
        keys: as they are cached, of each layer `[1, kv_heads, n, head_dim]`, in the model's dtype.
        values: likewise.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ids: Sequence[int]
    layers: list[LayerReading]
    keys: list[Tensor]
    values: list[Tensor]

    def until(self, end: int) -> PromptReading:
        """Returns the reading of the first `end` tokens, for scores."""
        read_on = partial(self._read_on, end)
        return PromptReading(self.ids[:end], _Widened(self.layers, end), read_on, self.tokenizer)

    def kept(self, *masks: Tensor, format: str = NATIVE) -> KeptCache:
        """Returns a cache of the first tokens of the prompt that shows only what is kept, a row for each mask.

        Args:
            masks: bool `[layers, kv_heads, end]` each.
            format: that keys and values are rounded to. Keys are rounded less the mean key of their KV head over these tokens,
                kept or not.
        """
        kept = torch.stack(masks)
        keys, values = self._first(kept.shape[-1])
        if format != NATIVE:
            keys = [_round_trip(key, format, key[0].float().mean(1)) for key in keys]
            values = [_round_trip(value, format) for value in values]
        return KeptCache(kept, keys, values)

    def _read_on(self, end: int, fed: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        watched = _Watched(*self._first(end))
        _feed(self.model, fed, watched)
        return [
            (query[0].float(), key[0, :, end:].float())
            for query, key in zip(watched.queries, watched.seen, strict=True)
        ]

    def _first(self, end: int) -> tuple[list[Tensor], list[Tensor]]:
        """Returns keys and values of the first tokens."""
        return [key[:, :, :end] for key in self.keys], [value[:, :, :end] for value in self.values]


@dataclass(frozen=True)
class _Widened(Sequence[LayerReading]):
    """The layers' first tokens in float32, each layer anew as it is asked for."""

    layers: Sequence[LayerReading]
    end: int

    def __len__(self) -> int:
        return len(self.layers)

    @overload
    def __getitem__(self, at: int) -> LayerReading: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[LayerReading]: ...
    def __getitem__(self, at: int | slice) -> LayerReading | Sequence[LayerReading]:
        if isinstance(at, slice):
            return _Widened(self.layers[at], self.end)
        own = self.layers[at].until(self.end)
        return replace(own, query=own.query.float(), key=own.key.float(), value=own.value.float())


class _Watched(WholeCache):
    """Remembers the queries of every layer, and the keys that they were asked of."""

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        super().__init__()
        self.queries: list[Tensor] = []
        self.seen: list[Tensor] = []
        for layer, pair in enumerate(zip(keys, values, strict=True)):
            self.update(*pair, layer)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.queries.append(query)
        self.seen.append(key)
        return super().attend(layer, query, key, value, scaling)


class _First(WholeCache):
    """Remembers the queries of every layer and the factor on its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Tensor, float]] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.asked.append((query, scaling))
        return super().attend(layer, query, key, value, scaling)


class _Asked(Attending):
    """Remembers the queries of one call of a layer."""

    query: Tensor

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.query = query
        return torch.zeros(*query.shape[:-1], value.shape[-1], dtype=value.dtype, device=value.device)


def read_prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> DenseReading:
    """Reads a prompt.

    Args:
        model: dense, without a plan.
        tokenizer: its tokenizer.
        ids: at least one token.

    Raises:
        ModelError: the model's layers attend in another way than by plain causal attention.
    """
    cache = _First()
    with _watched(model) as calls, torch.inference_mode(), attending(model):
        _feed(model, ids, cache)
    held: list[Any] = cache.layers
    keys: list[Tensor] = [one.keys for one in held]
    values: list[Tensor] = [one.values for one in held]
    layers = [
        LayerReading(
            layer,
            query[0],
            key[0],
            value[0],
            scaling,
            partial(_query_as_at, model, *call),
            *(each[0].float() for each in call[1]["position_embeddings"]),
        )
        for layer, (call, key, value, (query, scaling)) in enumerate(zip(calls, keys, values, cache.asked, strict=True))
    ]
    return DenseReading(model, tokenizer, ids, layers, keys, values)


def _round_trip(x: Tensor, format: str, centre: Tensor | None = None) -> Tensor:
    """Returns keys or values as a format gives them back, in their own dtype, `[1, kv_heads, tokens, dim]`.

    Args:
        x: keys or values, shaped so.
        format: its name.
        centre: subtracted before rounding and added back, float32 `[kv_heads, dim]`; None for none.
    """
    found = rounded(centred(x, centre), [find_format(format).code] * x.shape[1])
    return (found if centre is None else found + centre[:, None]).to(x.dtype)


def _feed(model: PreTrainedModel, ids: Sequence[int], cache: WholeCache) -> None:
    """Feeds tokens to the decoder; no logits are made."""
    decoder: Any = model.get_decoder() or model.base_model
    with torch.inference_mode(), attending(model):
        decoder(
            input_ids=torch.tensor([list(ids)], device=input_device(model)), use_cache=True, **cache_argument(cache)
        )


Call = tuple[torch.nn.Module, dict[str, Any]]


@contextmanager
def _watched(model: PreTrainedModel) -> Iterator[list[Call]]:
    """Notes how the attention module of every layer is called, without its cache."""
    calls: list[Call] = []

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("position_embeddings") is None:
            raise ModelError(
                f"{type(module).__name__} is not given its rotary embedding by the decoder; known ways to evict are measured "
                "on models that are"
            )
        given = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        calls.append((module, {**given, "hidden_states": given_hidden(args, kwargs)}))

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in attention_modules(model)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _query_as_at(
    model: PreTrainedModel, module: torch.nn.Module, given: dict[str, Any], cos: Tensor, sin: Tensor
) -> Tensor:
    """Calls one layer's attention again, without its cache and with every token at the same place; see `LayerReading`."""
    before = given["position_embeddings"]
    turned = tuple(each.to(old).expand_as(old) for each, old in zip((cos, sin), before, strict=True))
    forward: Callable[..., Any] = module.forward
    asked = _Asked()
    with torch.inference_mode(), attending(model), attended_by(asked):
        forward(**{**given, "position_embeddings": turned})
    return asked.query[0].float()
