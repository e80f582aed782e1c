"""The estimator: one pass of each kind and length is timed on this machine, and multiplied."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from moacompress.estimate.stopwatch import Stopwatch
from moacompress.estimate.work import Kind, Work
from moacompress.models.kept_logits import kept_logits
from moacompress.runtime.compat.alternates import cache_argument, returned_cache
from moacompress.runtime.linear import use_kernels

WARM = 16
"""Tokens of a first pass that is not timed: what is made once is made in it."""
SHORTEST = 128
"""Tokens of the shortest pass that others are extrapolated from."""
LONG_SECONDS = 2.0
"""Of a prompt; those of more tokens are not timed but extrapolated."""
DIFFERENT = 97
"""Tokens that a prompt is made of."""
ROWS = 256
"""Of the product that two dtypes are compared by."""

Pass = Callable[[int, int], object]
"""Runs a pass of so many tokens with so many targets."""


class Estimator:
    """Seconds of passes of one model, alone on the machine; each is timed when it is first asked for.

    Args:
        model: as it will run: dense, or under a plan.
        device: where it is.
        passes: run the kinds of pass other than a prompt and the steps behind it.
        windows: native windows of the layers. Passes are then timed at doubling lengths until one takes long, and
            longer ones are extrapolated: a prompt by its tokens and the keys that they attend to, a step by the tokens before
            it, other kinds as a prompt. Without it every length that is asked for is timed.
        longest: tokens of the longest of `passes` that is timed.

    Attributes:
        watch: timed everything, and knows how busy the machine was.
    """

    def __init__(
        self,
        model: Any,
        device: str | torch.device,
        passes: Mapping[Kind, Pass] | None = None,
        *,
        windows: Sequence[int | None] = (),
        longest: float = math.inf,
    ) -> None:
        self.watch = Stopwatch(device)
        self._model, self._device, self._passes = model, device, passes or {}
        self._windows, self._longest = windows, longest
        self._timed: dict[tuple[Kind, int], dict[int, float]] = {}

    def seconds(self, work: Iterable[Work]) -> float:
        """Returns how long some work takes."""
        return sum(part.count * self.one(part.kind, part.tokens, part.targets) for part in work)

    def one(self, kind: Kind, tokens: int, targets: int = 1) -> float:
        """Returns the seconds of one pass over so many tokens; only `passes` differ by the tokens with logits (`targets`)."""
        if kind is Kind.RERUN:
            return self.one(Kind.FORWARD, tokens)
        if kind is Kind.STEP:
            self.one(Kind.FORWARD, tokens)  # steps are timed behind prompts
            return _extrapolated(self._of(Kind.STEP), tokens, lambda n: n)
        timed, prompt = self._of(kind, targets), kind is Kind.FORWARD
        limit = LONG_SECONDS if prompt else LONG_SECONDS / 2  # of other passes the ratio to a prompt is enough
        for length in self._lengths(tokens, math.inf if prompt else self._longest):
            longest = max(timed, default=0)
            if length > longest and len(timed) > 1 and timed[longest] > limit:
                break
            if length not in timed:
                timed[length] = self._time(kind, length, targets)
        if prompt:
            per_token = {length: seconds / length for length, seconds in timed.items()}
            return tokens * _extrapolated(per_token, tokens, self._keys)
        longest = tokens if tokens in timed else max(timed)
        scale = 1.0 if longest == tokens else self.one(Kind.FORWARD, tokens) / self.one(Kind.FORWARD, longest)
        return timed[longest] * scale

    def _of(self, kind: Kind, targets: int = 1) -> dict[int, float]:
        """Returns what was timed of a kind of pass, seconds by tokens."""
        return self._timed.setdefault((kind, targets if kind in self._passes else 1), {})

    def _lengths(self, tokens: int, longest: float) -> list[int]:
        """Returns the lengths that would be timed for a pass, ascending."""
        if not self._windows:
            return [tokens]
        doubling = (SHORTEST * 2**power for power in range(32))
        return [length for length in (*(n for n in doubling if n < tokens), tokens) if length <= longest]

    def _keys(self, tokens: int) -> float:
        """Returns how many keys a token of a prompt attends to, mean over tokens and layers."""
        bands = [min(tokens, tokens if window is None else window) for window in self._windows or (None,)]
        return sum(band * (band + 1) / 2 + (tokens - band) * band for band in bands) / len(bands) / tokens

    def _time(self, kind: Kind, tokens: int, targets: int) -> float:
        if kind in self._passes:
            return self.watch.best(lambda: self._passes[kind](tokens, targets))
        return self._time_forward(tokens)

    @torch.no_grad()
    def _time_forward(self, tokens: int) -> float:
        """Times a prompt, and a step behind it."""
        ids = example_ids(tokens)[None].to(self._device)
        if not self._of(Kind.STEP):
            self._model(input_ids=ids[:, :WARM], use_cache=True)
        read: Any = None

        def prompt() -> None:
            nonlocal read
            read = kept_logits(self._model, 1, input_ids=ids, use_cache=True)

        seconds = self.watch.best(prompt)
        step = {"input_ids": ids[:, :1], "use_cache": True, **cache_argument(returned_cache(read))}
        self._of(Kind.STEP)[tokens] = self.watch.best(lambda: self._model(**step))
        return seconds


def example_ids(tokens: int) -> torch.Tensor:
    """Returns the tokens of a prompt that is timed, int64 `[tokens]`; they differ, so that experts share them."""
    return torch.arange(tokens) % DIFFERENT + 3


def _extrapolated(timed: Mapping[int, float], tokens: int, measure: Callable[[int], float]) -> float:
    """Returns the value at some tokens: the timed one, or on the line through the two longest, which never falls.

    The line is straight in what `measure` makes of tokens.
    """
    if tokens in timed:
        return timed[tokens]
    first, last = sorted(timed)[-2:]
    slope = (timed[last] - timed[first]) / (measure(last) - measure(first))
    return timed[last] + max(slope, 0.0) * (measure(tokens) - measure(last))


@torch.no_grad()
def product_seconds(model: nn.Module, dtype: torch.dtype) -> float:
    """Returns the seconds of one of the model's largest products of matrices in a dtype: what two dtypes are compared by."""
    layers = (module for module in model.modules() if isinstance(module, nn.Linear))
    largest = max(layers, key=lambda layer: min(layer.in_features, layer.out_features))
    device, inputs = largest.weight.device, largest.in_features
    layer = nn.Linear(inputs, largest.out_features, bias=False, device=device, dtype=dtype)
    use_kernels(layer)
    x = torch.ones(ROWS, inputs, dtype=dtype, device=device)
    return Stopwatch(device).best(lambda: layer(x))
