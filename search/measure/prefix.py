"""Reuse of unchanged layers: a forward pass that starts where a plan first changes the model.

Two plans that agree in their first layers give the same there. So one forward pass of a sample under one plan records the
output of every decoder layer, and the passes of other plans on that sample start from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from moacompress.calibration.profile.passes import replaced
from moacompress.models.modules import decoder_layers
from moacompress.rules.plan import Plan

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Prefix:
    """What the decoder layers returned in one forward pass.

    Attributes:
        outputs: of every layer, of whatever type the model's layers return.
    """

    outputs: tuple[Any, ...]


def first_changed(plan: Plan, base: Plan) -> int:
    """Returns the first layer that a plan needs computed where all before is as under another one.

    That is the first in which the two differ, or one before it whose attention a computed layer shares; the number of layers
    where none differs.
    """
    layers = range(plan.model.layers)
    differ = (
        layer for layer in layers if plan.rules[layer] != base.rules[layer] or plan.share(layer) != base.share(layer)
    )
    first = next(differ, len(layers))
    while True:
        anchors = [share.anchor for layer in layers[first:] if (share := plan.share(layer)) is not None]
        if min(anchors, default=first) >= first:
            return first
        first = min(anchors)


def record(model: torch.nn.Module, forward: Callable[[], Value]) -> tuple[Prefix, Value]:
    """Runs `forward`, one pass of the model without a cache; returns what its layers returned, and what the pass did."""
    layers = decoder_layers(model)
    outputs: list[Any] = [None] * len(layers)

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            outputs[layer] = output

        return hook

    handles = [module.register_forward_hook(keep(layer)) for layer, module in enumerate(layers)]
    try:
        result = forward()
    finally:
        for handle in handles:
            handle.remove()
    return Prefix(tuple(outputs)), result


@contextmanager
def resumed(model: torch.nn.Module, prefix: Prefix, layer: int) -> Iterator[None]:
    """Lets the layers before `layer` return what was recorded, at once, for the block's length.

    A forward pass of the same tokens, without a cache, then has the logits of a whole pass, if these layers have the rules that
    they were recorded under.
    """

    def given(output: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: output

    with ExitStack() as stack:
        for module, output in zip(decoder_layers(model)[:layer], prefix.outputs, strict=False):
            stack.enter_context(replaced(module, given(output)))
        yield
