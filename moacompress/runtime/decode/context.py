"""What the attention of one layer needs to know of the plan, and how it is handed to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch

from moacompress.core.arrays import Floats32, Ints
from moacompress.core.errors import UnsupportedError
from moacompress.kernels.arguments import as_tensors
from moacompress.models.modules import given_hidden
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.share import Share
from moacompress.runtime.cache.plan_cache import PlanCache
from moacompress.runtime.compat.alternates import CACHE_NAMES
from moacompress.runtime.gate import trained_scores

NAME = "moacompress"
"""Name of the attention implementation; it must not contain "flash", "sdpa" or "flex_attention"."""
CONTEXT = "moacompress_context"
"""Keyword under which a `LayerCall` reaches the attention."""


@dataclass(frozen=True)
class LayerContext:
    """A layer's part of the plan.

    Attributes:
        layer: index of the layer.
        rules: of its KV heads, with tensors on the CPU.
        native_window: the layer's own sliding window in tokens, or None.
        share: what it takes from its anchor, or None.
        serves: whether other layers share its attention.
        centre: what its keys lie less, float32 `[kv_heads, head_dim]` on the CPU; None for nothing.
    """

    layer: int
    rules: RuleTable
    native_window: int | None = None
    share: Share | None = None
    serves: bool = False
    centre: torch.Tensor | None = None
    _centres: dict[torch.device, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def kv_heads(self) -> int:
        """KV heads of the layer."""
        return len(self.rules)

    @cached_property
    def formats(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Codes of the formats of keys and of values, `[kv_heads]` each; None where all are native."""
        return self.rules.formats

    @cached_property
    def selects(self) -> bool:
        """Whether some of its rules keep tokens that a gate chooses."""
        return self.rules.selects

    @staticmethod
    def from_tensor(layer: int, columns: torch.Tensor) -> LayerContext:
        """Returns the context of a layer with a table's columns, as an operator is given them."""
        rules = RuleTable(columns)
        return LayerContext(layer, rules, int(rules.span.native_window[0]) or None)

    def centre_on(self, device: torch.device) -> torch.Tensor | None:
        """Returns `centre` on a device, where it stays: a step copies nothing to it."""
        if self.centre is None or device.type == "cpu":
            return self.centre
        if device not in self._centres:
            self._centres[device] = self.centre.to(device)
        return self._centres[device]

    def __reduce__(self) -> tuple[Any, ...]:
        # not as tensors, which would be read onto the device of the weights
        centre = None if self.centre is None else self.centre.numpy()
        return _from_columns, (
            self.layer,
            self.rules.columns.numpy(),
            self.native_window,
            self.share,
            self.serves,
            centre,
        )

    @staticmethod
    def of(
        layer: int,
        rules: Sequence[Rule],
        min_window: int,
        native_window: int | None,
        share: Share | None = None,
        serves: bool = False,
        centre: Floats32 | None = None,
    ) -> LayerContext:
        """Returns the context of a layer with these rules."""
        return _with_tensors(
            layer, RuleTable.of(rules, min_window, native_window), native_window, share, serves, centre
        )

    @property
    def takes_part(self) -> bool:
        """Whether it shares attention with another layer, as anchor or as its reuse layer."""
        return self.serves or self.share is not None


def _from_columns(layer: int, columns: Ints, *rest: Any) -> LayerContext:
    return _with_tensors(layer, RuleTable(columns.copy()), *rest)


def _with_tensors(layer: int, rules: RuleTable, native: Any, share: Any, serves: bool, centre: Any) -> LayerContext:
    with torch.inference_mode(False):  # or no gradients could be taken after a load in it
        here = as_tensors(rules)
        less = None if centre is None else torch.from_numpy(centre)
    # or a graph of as many rows as there are KV heads would be for no other number of rows
    torch._dynamo.mark_static(here.columns)
    context = LayerContext(layer, here, native, share, serves, less)
    context.formats, context.selects  # noqa: B018  read now: a graph could not
    return context


class LayerCall(NamedTuple):
    """What the hook of a layer hands to its attention.

    Attributes:
        context: the layer's part of the plan.
        cache: the model's, or None.
        gate_scores: of the tokens, int16 `[rows, kv_heads, tokens]`; None where no rule selects.
        trained_scores: the same before they are rounded, where gates are trained; else None.
    """

    context: LayerContext
    cache: PlanCache | None
    gate_scores: torch.Tensor | None = None
    trained_scores: torch.Tensor | None = None


@dataclass
class AttentionHook:
    """Hands a layer's part of the plan, and its cache, to the attention.

    Attributes:
        context: the layer's part.
        heads: which of the layer's KV heads it is of; None for all.
    """

    context: LayerContext
    heads: slice | None = None

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Runs before the attention module; see `torch.nn.Module.register_forward_pre_hook`."""
        call = self.call(module, kwargs)
        if self.context.selects:
            hidden = given_hidden(args, kwargs)
            scores, trained = module.gate(hidden), trained_scores(module.gate, hidden)
            if self.heads is not None:
                scores, trained = scores[:, self.heads], None if trained is None else trained[:, self.heads]
            call = call._replace(gate_scores=scores, trained_scores=trained)
        return args, {**kwargs, CONTEXT: call}

    def call(self, module: Any, kwargs: dict[str, Any]) -> LayerCall:
        """Returns what the attention is handed.

        Raises:
            UnsupportedError: the attention implementation was changed, or the layer's number.
        """
        if module.config._attn_implementation != NAME:
            raise UnsupportedError(
                f"the attention implementation was changed to {module.config._attn_implementation!r}, which would ignore "
                "the plan; use moacompress.detach(model) to get the dense model back"
            )
        if module.layer_idx != self.context.layer:
            raise UnsupportedError(
                f"layer_idx of a layer's attention was {self.context.layer} when the plan was put on the model, and is now "
                f"{module.layer_idx}: use moacompress.detach(model), change its layers, and make a plan for what they are then"
            )
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        return LayerCall(self.context, cache)
