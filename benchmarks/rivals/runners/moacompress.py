"""Ours, beside the rivals: a compressed checkpoint in bfloat16, in the environment that the benchmark itself runs in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moacompress.runtime.checkpoint import load_checkpoint
from moacompress.runtime.compat.alternates import cache_argument, returned_cache
from rivals.runners.engine import Job, SteppedEngine, serve


class Ours(SteppedEngine):
    """A checkpoint under its plan, which is the same before and behind the question."""

    packages = ("moacompress", "transformers", "torch")

    def __init__(self, task: Job) -> None:
        torch.set_num_threads(task["threads"])
        loaded = load_checkpoint(Path(task["checkpoint"]), "bfloat16", "cpu")
        self._model: Any = loaded.model
        self._plan = loaded.plan
        self.vocabulary = self._model.config.vocab_size
        self._held: Any = None
        self._logits: Any = None
        self._tokens = 0

    def read(self, ids: Sequence[int]) -> None:
        """As `SteppedEngine`."""
        self._held, self._tokens = None, 0
        self.more(ids)

    def more(self, ids: Sequence[int]) -> None:
        """As `SteppedEngine`."""
        with torch.inference_mode():
            out = self._model(
                input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1, **cache_argument(self._held)
            )
        self._held, self._logits = returned_cache(out), out.logits[0, -1]
        self._tokens += len(ids)

    def best(self) -> int:
        """As `SteppedEngine`."""
        return int(self._logits.argmax())

    def kv_bytes(self) -> int:
        """Returns the plan's bytes of the tokens that were read."""
        return int(self._plan.kv_bytes(self._tokens))


def make(task: Job) -> Ours:
    """Returns the engine of a checkpoint."""
    return Ours(task)


def main() -> None:
    """Answers jobs."""
    serve(make)
