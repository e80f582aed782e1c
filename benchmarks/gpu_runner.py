"""What all parts of `gpu.py` share: the clock of a device, models with random weights, and what the device reaches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from gpu_sizes import MIN_WINDOW, SHARE, Sizes  # beside this script
from transformers import LlamaConfig, LlamaForCausalLM

from moacompress.kernels import dispatch
from moacompress.kernels.backend import Backend
from moacompress.models.shape import config_shape
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule

LONG = 5.0
"""After so many seconds a measurement is not repeated once more."""


class Runner:
    """The clock of a device, models with random weights, and what the device reaches."""

    def __init__(self, device: str, sizes: Sizes) -> None:
        self.device, self.sizes = torch.device(device), sizes
        self.dtype = torch.bfloat16
        self._cold = torch.empty(min(sizes.copy, 1 << 28), dtype=torch.uint8, device=device)

    @property
    def on_gpu(self) -> bool:
        """Whether there are graphs, and times that mean something."""
        return self.device.type == "cuda"

    @property
    def backend(self) -> Backend:
        """What runs attention there."""
        return dispatch.backend_for(torch.empty(0, dtype=self.dtype, device=self.device))

    def seconds(self, run: Callable[[], Any]) -> float:
        """Returns the median time of a call, s, each after what caches of the card hold was written over.

        The card is still writing when it is given the call, so that a launch that takes the host less is not in its time.
        """
        run()
        found: list[float] = []
        while len(found) < self.sizes.repeats and sum(found) < LONG:
            self._cold.zero_()
            found.append(self._once(run))
        return statistics.median(found)

    def _once(self, run: Callable[[], Any]) -> float:
        if not self.on_gpu:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin_event.record()
        run()
        end_event.record()
        torch.cuda.synchronize(self.device)
        return float(begin_event.elapsed_time(end_event)) / 1e3

    def captured(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Returns what does the same as a call, after two of it: on a GPU by replaying a graph, elsewhere the call itself."""
        for _ in range(2):
            run()
        if not self.on_gpu:
            return run
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    @cached_property
    def copied(self) -> float:
        """Bytes that are read and written in a second where memory is copied."""
        source = torch.empty(self.sizes.copy, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * len(source) / self.seconds(lambda: target.copy_(source))

    @cached_property
    def multiplied(self) -> float:
        """Operations a second of a product of two matrices."""
        size = min(8192, int(self.sizes.copy**0.5) // 4)
        a, b = (torch.randn(size, size, dtype=self.dtype, device=self.device) for _ in range(2))
        return 2 * size**3 / self.seconds(lambda: a @ b)

    def bytes_row(self, size: float, seconds: float) -> dict[str, float]:
        """Returns what reading so many bytes in so many seconds is: GB/s, and the share of what copying memory reaches."""
        return {"GB/s": size / seconds / 1e9, "share_of_ceiling": size / seconds / self.copied}

    def model(self, layers: int | None = None, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
        """Returns a model with random weights, whose layers may be fewer than those of the configuration."""
        sizes: dict[str, Any] = self.sizes.model | ({} if layers is None else {"num_hidden_layers": layers})
        config = LlamaConfig(**sizes, dtype=str(dtype).removeprefix("torch."), bos_token_id=None, eos_token_id=None)
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(self.device):
                made: Any = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        found: LlamaForCausalLM = made.eval()
        return found  # not frozen: PyTorch copies a frozen head to multiply a prompt's last state

    def shape(self, model: LlamaForCausalLM) -> ModelShape:
        """Returns a model's shape; its weights, which nobody else has, are not read for a fingerprint."""
        return config_shape(model.config, dtype=str(model.dtype).removeprefix("torch."))

    def plan(self, model: LlamaForCausalLM, key: str = "native", value: str = "native") -> Plan:
        """Returns a plan of equal spans, a quarter of the tokens, in a pair of formats."""
        shape = self.shape(model)
        rule = Rule(4, 0, SHARE, key, value)
        return Plan(shape, MIN_WINDOW, ((rule,) * shape.kv_heads,) * shape.layers)
