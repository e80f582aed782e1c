"""transformers' own quantized caches: what `cache_implementation="quantized"` gives, in memory that is counted.

Such a cache returns from its first update what it was given, unrounded, and keeps up to `RESIDUAL` tokens unrounded until it
rounds all again. So nothing is ever scored in the forward that fills it: a prompt is read first and its answer continues from
there, and text is read in `text_steps`, which rounds when it would be rounded if it were generated. The model runs as
transformers runs it, without a plan.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import QuantizedCache

from moacompress.core.errors import UsageError
from moacompress.core.files import fingerprint
from moacompress.evaluation.baselines.compared_models import ComparedModel
from moacompress.models.shape import config_shape
from moacompress.runtime.compat import versions
from moacompress.runtime.compat.alternates import FP8_CACHE_SINCE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moacompress.rules.model_shape import ModelShape

RESIDUAL, GROUP = 128, 64
"""Tokens after which transformers rounds again, and numbers that share a scale where they divide a head: its defaults."""


def text_steps(tokens: int) -> list[int]:
    """Returns how many of a text's tokens go into a cache at a time, for it to round when it would if they were generated.

    The first `RESIDUAL` are rounded as they come. Versions of transformers differ in whether they count all tokens of an update
    or one; where the last of every `RESIDUAL` comes alone that is the same.
    """
    steps = [min(tokens, RESIDUAL)]
    while (left := tokens - sum(steps)) > 0:
        steps += [min(left, RESIDUAL - 1)] + [1] * (left >= RESIDUAL)
    return steps


@dataclass(frozen=True)
class QuantizedKind:
    """One of transformers' quantized caches.

    Attributes:
        name: as in the results.
        backend: of `transformers.QuantizedCache`.
        bits: of a code that shares its scale with a group of others; None for numbers of 8 bits that all share one.
        axis: along which groups lie, so that each is part of one token's key or value; the backends count differently.
        module: what the backend imports, or None where transformers has all.
        unit: rounding is only possible at a multiple of so many tokens: hqq packs two rows of codes into one.
        since: the first minor version of transformers that has it, "" where every tested one does.
    """

    name: str
    backend: str
    bits: int | None = None
    axis: int = 0
    module: str | None = None
    unit: int = 1
    since: str = ""

    def check_installed(self) -> None:
        """Refuses a backend whose package is not there, or that the installed transformers does not have.

        Raises:
            UsageError: says what to install.
        """
        if versions.minor(self.since) > versions.INSTALLED:
            raise UsageError(
                f"{self.name} needs transformers {self.since} or newer, and {versions.installed()} is installed; "
                f"`pip install 'transformers>={self.since}'`, or compare with another quantized cache"
            )
        try:
            if self.module is not None:
                importlib.import_module(self.module)
        except ImportError as error:
            raise UsageError(
                f"{self.name} needs {self.module}, which cannot be imported ({error}); install it with "
                "`pip install 'moacompress[rivals]'`"
            ) from error

    def new_cache(self, model: PreTrainedModel) -> Any:
        """Returns an empty cache.

        Raises:
            UsageError: the model has layers that such a cache cannot hold, such as sliding ones.
        """
        options = {}
        if self.bits is not None:
            options = {"nbits": self.bits, "axis_key": self.axis, "axis_value": self.axis, "residual_length": RESIDUAL}
            options["q_group_size"] = math.gcd(GROUP, config_shape(model.config, dtype="float32").head_dim)
        try:
            return CopiedCache(backend=self.backend, config=model.config, **options)
        except ValueError as error:
            raise UsageError(f"{self.name} cannot be measured on this model: {error}") from error

    def measured_bytes(self, model: PreTrainedModel, shape: ModelShape, tokens: int, last: int) -> int:
        """Returns the bytes of the tensors that a cache of one row holds, those that are not rounded yet included.

        Keys and values are in the shape's dtype. Of the `tokens` that were read at least `last` came after all the others.
        """
        layer = self.new_cache(model).layers[0]
        first = tokens - last - (tokens - last) % self.unit
        for size in filter(None, (first, tokens - first)):
            keys = torch.randn(1, shape.kv_heads, size, shape.head_dim).to(getattr(torch, shape.dtype))
            layer.update(keys, keys.clone())
        return shape.layers * held_bytes(vars(layer))


class CopiedCache(QuantizedCache):
    """A quantized cache that can be copied where its tensors cannot: its layers replace them and never write into them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiedCache:
        copied = copy.copy(self)
        copied.layers = [copy.copy(layer) for layer in self.layers]
        return copied


def held_bytes(values: Any) -> int:
    """Returns the bytes of all tensors in nested tuples, lists and dictionaries, each piece of memory once."""
    storages = (tensor.untyped_storage() for tensor in _plain_tensors(values))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _plain_tensors(values: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors in nested containers; of one that is made of others, such as codes and scales, these."""
    if isinstance(values, torch.Tensor):
        if hasattr(values, "__tensor_flatten__"):
            for name in values.__tensor_flatten__()[0]:
                yield from _plain_tensors(getattr(values, name))
        else:
            yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _plain_tensors(value)
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _plain_tensors(value)


@dataclass(frozen=True)
class ComparedQuantizedCache(ComparedModel):
    """The dense model with one of transformers' quantized caches; its bytes are measured."""

    kind: QuantizedKind

    @property
    def unit(self) -> int:
        """Tokens that are read at a time, so that rounding falls where it does in generation."""
        return self.kind.unit

    def key(self) -> str:
        """Returns a digest of backend, bits and group."""
        return fingerprint([self.kind.backend, self.kind.bits, self.kind.axis, RESIDUAL, GROUP])

    def new_cache(self, model: PreTrainedModel) -> Any:
        """Returns an empty quantized cache for one batch."""
        return self.kind.new_cache(model)


_HQQ, _QUANTO = "hqq.core.quantize", "optimum.quanto"
_KINDS = (
    QuantizedKind("quantized:hqq-8", "hqq", 8, 1, _HQQ),
    QuantizedKind("quantized:hqq-4", "hqq", 4, 1, _HQQ, unit=2),
    QuantizedKind("quantized:quanto-4", "quanto", 4, 0, _QUANTO),
    QuantizedKind("quantized:fp8", "fp8", since=FP8_CACHE_SINCE),
)
QUANTIZED: Mapping[str, QuantizedKind] = {kind.name: kind for kind in _KINDS}
"""The quantized caches that can be measured against, by name; another one is a line here."""
