"""What passes of a model take on this machine, each measured once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from moacompress.estimate.stopwatch import Stopwatch
from moacompress.models.kept_logits import kept_logits
from moacompress.runtime.compat.alternates import cache_argument, returned_cache
from moacompress.runtime.linear import use_kernels

WARM = 16
"""Tokens of a first pass that is not timed: what is made once is made in it."""
REPEATS = 3
"""Short work is timed so often, after one time that does not count; the least counts."""
ROWS = 256
"""Of the product that two dtypes are compared by."""
OPENING_SECONDS, BYTES_PER_SECOND = 5.0, 200e6
"""Of a fresh process that opens a checkpoint, and of reading or writing its weights."""


class Rates(ABC):
    """Seconds of passes of one model, alone on the machine; each is measured when it is first asked for.

    Args:
        device: where the model is.

    Attributes:
        watch: timed everything, and knows how busy the machine was.
    """

    def __init__(self, device: str | torch.device) -> None:
        self.watch = Stopwatch(device)
        self._forwards: dict[int, float] = {}
        self._steps: dict[int, float] = {}

    def forward(self, tokens: int) -> float:
        """Returns the seconds of reading one prompt of so many tokens."""
        if tokens not in self._forwards:
            self._forwards[tokens] = self._forward(tokens)
        return self._forwards[tokens]

    def step(self, tokens: int) -> float:
        """Returns the seconds of one more token after so many."""
        if tokens not in self._steps:
            self._steps[tokens] = self._step(tokens)
        return self._steps[tokens]

    @abstractmethod
    def _forward(self, tokens: int) -> float:
        """Measures `forward`."""

    @abstractmethod
    def _step(self, tokens: int) -> float:
        """Measures `step`."""


class TimedRates(Rates):
    """Times passes of the very lengths that are asked for.

    Args:
        model: as it will run: dense, or under a plan.
        device: where it is.
    """

    def __init__(self, model: Any, device: str | torch.device) -> None:
        super().__init__(device)
        self._model, self._device = model, device

    @torch.no_grad()
    def _forward(self, tokens: int) -> float:
        ids = torch.full((1, tokens), 3, device=self._device)
        if not self._forwards:
            self._model(input_ids=ids[:, :WARM], use_cache=True)
        forward, read = self.watch.once(lambda: kept_logits(self._model, 1, input_ids=ids, use_cache=True))
        step = {"input_ids": ids[:, :1], "use_cache": True, **cache_argument(returned_cache(read))}
        self._steps[tokens] = self.watch.best_of(lambda: self._model(**step), REPEATS)
        return forward

    def _step(self, tokens: int) -> float:
        self.forward(tokens)  # a step is measured behind its prompt
        return self._steps[tokens]


@torch.no_grad()
def product_seconds(model: nn.Module, dtype: torch.dtype) -> float:
    """Returns the seconds of one of the model's largest products of matrices in a dtype: what two dtypes are compared by."""
    layers = (module for module in model.modules() if isinstance(module, nn.Linear))
    largest = max(layers, key=lambda layer: min(layer.in_features, layer.out_features))
    device, inputs = largest.weight.device, largest.in_features
    layer = nn.Linear(inputs, largest.out_features, bias=False, device=device, dtype=dtype)
    use_kernels(layer)
    x = torch.ones(ROWS, inputs, dtype=dtype, device=device)
    return Stopwatch(device).best_of(lambda: layer(x), REPEATS)
