"""Proof that a compiled step is one graph: graphs are counted as they are made, and again whenever they run.

`torch.compile` falls back silently. A step that breaks into several graphs, that runs partly or wholly uncompiled, or that
is compiled again while it is timed would make a baseline look slow, so it is never called the best one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moacompress.runtime.compat import private_names

_counters = private_names.resolve(private_names.COUNTERS)
_lookup_backend = private_names.resolve(private_names.LOOKUP_BACKEND)
BACKEND = "inductor"


@dataclass(frozen=True)
class Proof:
    """What was counted.

    Attributes:
        graphs: graphs that were made before the timing.
        graph_breaks: places where tracing stopped.
        recompiles: graphs that were made while it was timed.
        graph_calls: times that a graph ran while it was timed.
        steps: calls of the step while it was timed.
    """

    graphs: int
    graph_breaks: int
    recompiles: int
    graph_calls: int
    steps: int

    @property
    def problem(self) -> str | None:
        """What is wrong, or None where every step was one run of one graph."""
        if self.graph_breaks:
            return f"its graph breaks ({self.graph_breaks} times)"
        if self.recompiles:
            return f"it was compiled again {self.recompiles} times while it was timed"
        if self.graph_calls != self.steps:
            return f"{self.steps} steps ran {self.graph_calls} graphs, not one each"
        return None


class CompiledForward:
    """A model's forward under `torch.compile` whose graphs are counted."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._inner: Any = _lookup_backend(BACKEND)
        self._forward = torch.compile(forward, backend=self._compile)
        self._graphs = self._calls = self._steps = self._breaks = 0
        self._before = (0, 0, 0)

    def __call__(self, **inputs: Any) -> Any:
        """Runs the forward."""
        before, graphs = sum(_counters["graph_break"].values()), self._graphs
        found = self._forward(**inputs)
        self._steps += 1
        if self._graphs != graphs:
            self._breaks += sum(_counters["graph_break"].values()) - before
        return found

    def _compile(self, module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self._graphs += 1
        compiled = self._inner(module, inputs)

        def counted(*arguments: Any) -> Any:
            self._calls += 1
            return compiled(*arguments)

        return counted

    def begin(self) -> None:
        """The timing begins: what is counted from now on is held against it."""
        self._before = self._graphs, self._calls, self._steps

    def proof(self) -> Proof:
        """Returns what was counted since `begin`."""
        graphs, calls, steps = self._before
        return Proof(graphs, self._breaks, self._graphs - graphs, self._calls - calls, self._steps - steps)
