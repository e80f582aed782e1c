"""Whether a decoder still runs the layers that a plan was put on, each in its place.

A plan's layers go by their places, as a checkpoint's weights do. Layers that are removed, added or reordered afterwards would
run, and be saved, under rules that were never meant for where they are now.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch

from moacompress.core.errors import UnsupportedError
from moacompress.runtime.decode.context import AttentionHook

DEPTH = "num_hidden_layers"


class LayerOrder:
    """Looks at a decoder's layers before each of its forwards.

    `attention`: their attention modules, in the order of the plan.
    """

    def __init__(self, decoder: torch.nn.Module, attention: Sequence[torch.nn.Module]) -> None:
        self._depth = len(attention)
        self._layers, self._attention = _names(decoder, attention[0])
        self._known: tuple[Any, ...] = tuple(attention)

    def check(self, decoder: Any) -> None:
        """Compares them.

        Raises:
            UnsupportedError: they are others, of another number or in another order; or fewer are to be run.
        """
        if not self._layers:
            return
        depth = vars(decoder.config).get(DEPTH, self._depth)
        layers = decoder._modules[self._layers]._modules.values()
        found = tuple([layer._modules.get(self._attention) for layer in layers])
        if depth == self._depth == len(found) and all(map(is_, found, self._known)):
            return
        if depth != self._depth or _places(layers) != [*range(self._depth)]:
            raise UnsupportedError(
                f"the plan was put on {self._depth} decoder layers, which go by their places; the model runs {len(found)} now "
                f"(config.{DEPTH} is {depth}), or they were reordered or replaced: use moacompress.detach(model), change its "
                "layers, and make a plan for what they are then"
            )
        self._known = found


def _names(decoder: torch.nn.Module, attention: torch.nn.Module) -> tuple[str, str]:
    """Returns the names of a decoder's list of layers and of a layer's attention; empty ones where they are not found."""
    for name, part in decoder._modules.items():
        for layer in part._modules.values() if isinstance(part, torch.nn.ModuleList) else ():
            for own, module in layer._modules.items() if layer is not None else ():
                if module is attention:
                    return name, own
    return "", ""


def _places(layers: Any) -> list[int]:
    """Returns the places that the plan has for layers, which may be within other modules by now."""
    return [
        hook.context.layer
        for layer in layers
        for module in layer.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, AttentionHook)
    ]
