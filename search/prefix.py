"""Reuse of unchanged layers: a forward pass that starts where a plan first changes the model.

Under a plan whose first layers keep everything, these layers give what they give under the full plan. So one forward
pass of a sample records the output of every decoder layer, and the passes of all plans on that sample start from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from moacompress.calibration.passes import replaced
from moacompress.models import decoder_layers
from moacompress.plan import Plan

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Prefix:
    """What the decoder layers returned in one forward pass.

    Attributes:
        outputs: of every layer, of whatever type the model's layers return.
    """

    outputs: tuple[Any, ...]


def first_changed(plan: Plan) -> int:
    """Returns the first layer in which a KV head does not keep everything; the number of layers where none does."""
    return next(
        (layer for layer, row in enumerate(plan.rules) if not all(rule.is_full for rule in row)), plan.model.layers
    )


def record(model: torch.nn.Module, forward: Callable[[], Result]) -> tuple[Prefix, Result]:
    """Runs a forward pass of the model and returns what its layers returned, and what the pass did.

    Args:
        model: a causal LM.
        forward: runs the model once, without a cache. For exactly the numbers that plans are compared with, the model
            is under its full plan.
    """
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

    A forward pass of the same tokens, without a cache, then has the logits of a whole pass, if under the model's plan
    these layers keep everything.

    Args:
        model: the model that was recorded.
        prefix: of the same tokens.
        layer: the first layer that is computed, 0 to the number of layers.
    """

    def given(output: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: output

    with ExitStack() as stack:
        for module, output in zip(decoder_layers(model)[:layer], prefix.outputs, strict=False):
            stack.enter_context(replaced(module, given(output)))
        yield
