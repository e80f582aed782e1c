"""Reads a prompt once with the dense model, and keeps what every layer attended with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moacompress.core.errors import ModelError
from moacompress.evaluation.eviction.attention import KeptCache, WholeCache, attending
from moacompress.kernels.centred_keys import centred
from moacompress.kernels.reference.rounding import rounded
from moacompress.models.modules import attention_modules, given_hidden
from moacompress.models.placement import input_device
from moacompress.rules.formats import NATIVE, find_format
from moacompress.runtime.compat.alternates import CACHE_NAMES, cache_argument

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LayerReading:
    """What one layer of the dense model attended with as it read a prompt of `n` tokens.

    `query`, `key` and `value` are made float32 as they are asked for, so that those of few layers are in memory at a time.

    Attributes:
        layer: its index.
        attended: query, key and value in the model's dtype.
        scaling: factor on the scores.
        query_as_at: returns the layer's queries of all tokens as if all stood where the rotary embedding has the given cosines
            and sines, `[rotated numbers]` each: `[heads, n, head_dim]`. It is linear in the two, so means of cosines and sines
            give mean queries.
        cos: of the rotary embedding at every position, `[n, rotated numbers]`.
        sin: of the rotary embedding, `[n, rotated numbers]`.
    """

    layer: int
    attended: tuple[Tensor, Tensor, Tensor]
    scaling: float
    query_as_at: Callable[[Tensor, Tensor], Tensor]
    cos: Tensor
    sin: Tensor

    @property
    def query(self) -> Tensor:
        """After the rotary embedding, `[heads, n, head_dim]`."""
        return self.attended[0].float()

    @property
    def key(self) -> Tensor:
        """As it is cached, `[kv_heads, n, head_dim]`."""
        return self.attended[1].float()

    @property
    def value(self) -> Tensor:
        """As it is cached, `[kv_heads, n, value_dim]`."""
        return self.attended[2].float()

    @property
    def grouped_query(self) -> Tensor:
        """The queries of each KV head's group, `[kv_heads, group, n, head_dim]`."""
        grouped: Tensor = self.query.unflatten(0, (len(self.attended[1]), -1))
        return grouped

    def until(self, end: int) -> LayerReading:
        """Returns the same of the first `end` tokens alone; attention is causal, so these do not know what follows."""
        own = self.query_as_at
        query, key, value = (each[:, :end] for each in self.attended)
        return replace(
            self,
            attended=(query, key, value),
            query_as_at=lambda cos, sin: own(cos, sin)[:, :end],
            cos=self.cos[:end],
            sin=self.sin[:end],
        )


@dataclass(frozen=True)
class PromptReading:
    """A prompt that the dense model has read, for any number of ways to evict.

    Attributes:
        ids: its `n` tokens.
        layers: what each layer attended with.
        model: the dense model.
        tokenizer: the model's.
    """

    ids: Sequence[int]
    layers: Sequence[LayerReading]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def until(self, end: int) -> PromptReading:
        """Returns the reading of the first `end` tokens."""
        return replace(self, ids=self.ids[:end], layers=[layer.until(end) for layer in self.layers])

    def read_on(self, fed: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Feeds further tokens to the dense model and returns for each layer their queries and keys; forgets them again.

        They are `[heads, tokens, head_dim]` and `[kv_heads, tokens, head_dim]`.
        """
        cache = _AskedCache()
        for layer, pair in enumerate(self._cached(len(self.ids))):
            cache.update(*pair, layer)
        _feed(self.model, fed, cache)
        return [(query[0].float(), key[0, :, len(self.ids) :].float()) for query, key, *_ in cache.asked]

    def kept(self, *masks: Tensor, format: str = NATIVE) -> KeptCache:
        """Returns a cache of the first tokens of the prompt that shows only what is kept, a row for each mask.

        Args:
            masks: bool `[layers, kv_heads, end]` each.
            format: that keys and values are rounded to. Keys are rounded less the mean key of their KV head over these tokens,
                kept or not.
        """
        kept = torch.stack(masks)
        keys, values = map(list, zip(*self._cached(kept.shape[-1]), strict=True))
        if format != NATIVE:
            keys = [_round_trip(key, format, key[0].float().mean(1)) for key in keys]
            values = [_round_trip(value, format) for value in values]
        return KeptCache(kept, keys, values)

    def _cached(self, end: int) -> list[tuple[Tensor, Tensor]]:
        """Returns keys and values of the first tokens in each layer, `[1, kv_heads, end, dim]`."""
        return [(key[None, :, :end], value[None, :, :end]) for _, key, value in (one.attended for one in self.layers)]


class _AskedCache(WholeCache):
    """Remembers what every layer attended with: queries, keys, values, and the factor on the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Tensor, Tensor, Tensor, float]] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.asked.append((query, key, value, scaling))
        return super().attend(layer, query, key, value, scaling)


def read_prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> PromptReading:
    """Reads a prompt.

    Args:
        model: dense, without a plan.
        tokenizer: its tokenizer.
        ids: at least one token.

    Raises:
        ModelError: the model's layers attend in another way than by plain causal attention.
    """
    cache = _AskedCache()
    with _watched(model) as calls:
        _feed(model, ids, cache)
    layers = []
    for layer, (call, (query, key, value, scaling)) in enumerate(zip(calls, cache.asked, strict=True)):
        cos, sin = (each[0].float() for each in call[1]["position_embeddings"])
        as_at = partial(_query_as_at, model, *call)
        layers.append(LayerReading(layer, (query[0], key[0], value[0]), scaling, as_at, cos, sin))
    return PromptReading(ids, layers, model, tokenizer)


def _round_trip(x: Tensor, format: str, centre: Tensor | None = None) -> Tensor:
    """Returns keys or values, `[1, kv_heads, tokens, dim]`, as a format gives them back, in their own dtype.

    A centre, float32 `[kv_heads, dim]`, is subtracted before rounding and added back.
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
    asked: list[Tensor] = []

    def note(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        asked.append(query)
        return value.new_zeros(*query.shape[:-1], value.shape[-1])

    with torch.inference_mode(), attending(model, note):
        forward(**{**given, "position_embeddings": turned})
    return asked[0][0].float()
