"""Other scores of tokens than influence that gates can be fitted to: those that depend on a token and the ones before it.

A gate decides by a score that is stored with a token, so what later tokens ask for cannot be in it. A gate that is fitted to
one of these is a linear probe like any other and runs like it; `Gates.report` says how much of the score's own choice it makes.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moacompress.calibration.profile.passes import Recording, all_attended, recorded
from moacompress.core.arrays import Floats32
from moacompress.core.errors import ModelError, UsageError, did_you_mean
from moacompress.core.plugins import SCORERS as OUTSIDE
from moacompress.core.plugins import named_plugins
from moacompress.models.modules import attention_modules, given_hidden
from moacompress.models.tensor_parallel import heads_here, of_all_ranks
from moacompress.recipe_sections import INFLUENCE
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.runtime.compat.alternates import CACHE_NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moacompress.calibration.data.samples import Sample


LATER = 512
"""Next positions over which a rotation is averaged."""
NEED_LATER = ("streaming-llm", "h2o", "snapkv", "pyramidkv", "adakv", "kvzip")
"""Known ways to evict by what later tokens attend to, or by no score of a token at all: no gate can be fitted to them."""


@dataclass(frozen=True)
class LayerTokens:
    """What one layer made of the tokens of a sample, float32.

    Attributes:
        key: as it is cached, `[kv_heads, n, head_dim]`.
        value: `[kv_heads, n, value_dim]`.
        scaling: factor on the scores.
        turned: returns queries and keys as if every token stood at one place; see `key_before` and `later_query`.
    """

    key: Tensor
    value: Tensor
    scaling: float
    turned: Callable[[bool], tuple[Tensor, Tensor]]

    @cached_property
    def key_before(self) -> Tensor:
        """The keys before the rotary embedding, `[kv_heads, n, head_dim]`."""
        return self.turned(False)[1]

    @cached_property
    def later_query(self) -> Tensor:
        """The queries before the rotary embedding, turned by the mean of the next positions, `[heads, n, head_dim]`.

        That is the mean rotation of 1 to `LATER` positions, or as many as the sample has.
        """
        return self.turned(True)[0]


class Scorer(ABC):
    """A score of tokens that gates can be fitted to.

    Attributes:
        name: as `profile.scorer` gives it.
    """

    name: ClassVar[str]

    def prepare(self, samples: Iterator[Sequence[LayerTokens]]) -> Any:
        """Returns what the scores need of all samples that gates are fitted to; by default nothing.

        Args:
            samples: what every layer made of each of them.
        """
        return None

    @abstractmethod
    def importance(self, layer: int, tokens: LayerTokens, prepared: Any) -> Tensor:
        """Returns how important tokens are, not negative, `[kv_heads, n]`: the higher, the sooner a token is kept.

        Args:
            layer: its index.
            tokens: of a sample; what is said of one may depend on it and on those before it alone.
            prepared: what `prepare` returned.
        """


@dataclass(frozen=True)
class ValueNorm(Scorer):
    """The norm of a token's value (as in VATP, arXiv 2406.12335)."""

    name = "value-norm"

    def importance(self, layer: int, tokens: LayerTokens, prepared: Any) -> Tensor:
        """Returns the norm."""
        norm: Tensor = tokens.value.norm(dim=-1)
        return norm


@dataclass(frozen=True)
class RunningKeyDiff(Scorer):
    """KeyDiff (arXiv 2504.15364) as tokens come: how far a key points away from the mean of the keys so far."""

    name = "keydiff"

    def importance(self, layer: int, tokens: LayerTokens, prepared: Any) -> Tensor:
        """Returns 1 minus the cosine of a key and the mean of all up to it, each at unit length."""
        unit = functional.normalize(tokens.key, dim=-1)
        return (1 - functional.cosine_similarity(tokens.key, unit.cumsum(1), dim=-1)).clamp_min(0)


@dataclass(frozen=True)
class CalibratedAttention(Scorer):
    """Expected Attention (arXiv 2510.00636) with mean and covariance of calibration's queries in place of the prompt's.

    With queries `q ~ N(m, C)`, turned by the mean rotation of the next positions, a key `k` before its rotary embedding gets
    `exp(s k.m + s^2 k.C k / 2)`, averaged over the query heads of its group, times the norm of its value.

    Attributes:
        sinks: first tokens of a sample that mean and covariance leave out.
    """

    name = "expected-attention"
    sinks: int = 4

    def prepare(self, samples: Iterator[Sequence[LayerTokens]]) -> list[tuple[Tensor, Tensor]]:
        """Returns mean `[heads, head_dim]` and covariance `[heads, head_dim, head_dim]` of the turned queries of each layer."""
        sums: list[list[Any]] = []
        for layers in samples:
            sums = sums or [[0.0, 0.0, 0] for _ in layers]
            for held, tokens in zip(sums, layers, strict=True):
                query = tokens.later_query[:, self.sinks :].double()
                held[0] = held[0] + query.sum(1)
                held[1] = held[1] + query.transpose(1, 2) @ query
                held[2] += query.shape[1]
        means = [total / count for total, _, count in sums]
        squares = [square / count for _, square, count in sums]
        return [
            (mean.float(), (square - mean[:, :, None] * mean[:, None]).float())
            for mean, square in zip(means, squares, strict=True)
        ]

    def importance(self, layer: int, tokens: LayerTokens, prepared: Any) -> Tensor:
        """Returns the expected attention, not normalised, times the norm of the value."""
        key, scaling = tokens.key_before, tokens.scaling
        mean, covariance = (part.unflatten(0, (len(key), -1)) for part in prepared[layer])
        logits = (key[:, None] @ mean[..., None])[..., 0] * scaling
        logits = logits + ((key[:, None] @ covariance) * key[:, None]).sum(-1) * (scaling**2 / 2)
        logits = logits - logits.amax((1, 2), keepdim=True)  # one factor for all tokens of a KV head
        norm: Tensor = tokens.value.norm(dim=-1)
        expected: Tensor = logits.exp().mean(1)
        return expected * norm


_OURS: tuple[type[Scorer], ...] = (ValueNorm, RunningKeyDiff, CalibratedAttention)
SCORERS: dict[str, type[Scorer]] = {kind.name: kind for kind in _OURS}
"""Those of this package; see `known_scorers`."""


@functools.cache
def known_scorers() -> dict[str, type[Scorer]]:
    """Returns all scorers by name: ours, and those of installed packages.

    These are classes, in the entry points of `moacompress.scorers`. What is none, or has a name that is taken, is left out
    with a warning.
    """
    outside = named_plugins(
        OUTSIDE,
        "class of a scorer",
        lambda given: isinstance(given, type) and issubclass(given, Scorer),
        lambda name: name in (*SCORERS, *NEED_LATER, INFLUENCE),
    )
    return {**SCORERS, **outside}


def find_scorer(name: str) -> Scorer | None:
    """Returns a scorer by its name, None for `INFLUENCE`.

    Raises:
        UsageError: unknown, or a score that needs later tokens; names those there are.
    """
    known = known_scorers()
    if name == INFLUENCE:
        return None
    if name in known:
        return known[name]()
    names = ", ".join((INFLUENCE, *known))
    if name in NEED_LATER:
        raise UsageError(
            f"no gate can be fitted to {name}: it has no score of a token that is known before later tokens are read, and a "
            f"gate decides by a score that is stored with the token; scorers are {names}"
        )
    raise UsageError(f"unknown scorer {name!r}; {did_you_mean(name, (INFLUENCE, *known), f'scorers are {names}')}")


def scored_by(
    scorer: Scorer, model: PreTrainedModel, shape: ModelShape, samples: Sequence[Sample]
) -> Callable[[int], Floats32]:
    """Returns a function that gives the importance of a sample's tokens by its number, `[layers, kv_heads, tokens]`.

    `samples` are those that gates are fitted to, and the model is dense.
    """
    prepared: list[Any] = []

    def importance(index: int) -> Floats32:
        with torch.inference_mode():
            if not prepared:
                prepared.append(scorer.prepare(read_layers(model, shape, sample) for sample in samples))
            layers = read_layers(model, shape, samples[index])
            found = [scorer.importance(layer, tokens, prepared[0]).float() for layer, tokens in enumerate(layers)]
            here = torch.stack([each.to(found[0].device) for each in found])
            every = of_all_ranks(here, heads_here(model, shape.kv_heads), shape.kv_heads, dim=1)
        return np.asarray(every.cpu())

    return importance


def read_layers(model: PreTrainedModel, shape: ModelShape, sample: Sample) -> list[LayerTokens]:
    """Returns what every layer of the dense model makes of a sample."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        calls.append((module, {**given, "hidden_states": given_hidden(args, kwargs)}))

    with ExitStack() as stack:
        for module in attention_modules(model):
            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        every = all_attended(model, shape, sample.input_ids)
    found = []
    for layer, attended in sorted(every.items()):
        assert attended.value is not None
        turned = functools.partial(_turned, model, shape, layer, *calls[layer])
        found.append(LayerTokens(attended.key[0].float(), attended.value[0].float(), attended.spec.scaling, turned))
    return found


def _turned(
    model: PreTrainedModel, shape: ModelShape, layer: int, module: Any, given: dict[str, Any], later: bool
) -> tuple[Tensor, Tensor]:
    """Calls one layer's attention again with every token at one place; returns queries and keys, float32.

    The rotary embedding is linear in its cosines and sines, so that their means turn by the mean rotation.
    """
    embeddings = given.get("position_embeddings")
    if embeddings is None:
        raise ModelError(
            f"{type(module).__name__} is not given its rotary embedding by the decoder, so its queries cannot be averaged over "
            "positions; choose another scorer"
        )
    places = slice(1, LATER + 1) if later else slice(0, 1)
    means = tuple(each[:, places].mean(1, keepdim=True).expand_as(each) for each in embeddings)
    recording = Recording.of(shape, RuleTable.of([Rule.FULL], 1), values=True)
    with recorded(model, recording):
        module.forward(**{**given, "position_embeddings": means})
    assert recording.attended is not None
    attended = recording.attended[layer]
    return attended.query[0].float(), attended.key[0].float()
