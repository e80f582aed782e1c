"""Ours, beside the rivals: a compressed checkpoint in bfloat16, or a baseline, of which only the kept keys are asked.

It runs in the environment that the benchmark itself runs in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moacompress.evaluation.eviction.reading import read_prompt
from moacompress.evaluation.eviction.registry import known_evictions
from moacompress.runtime.checkpoint import load_checkpoint
from moacompress.runtime.compat.alternates import cache_argument, returned_cache
from rivals.runners.engine import Engine, Job, SteppedEngine


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


class OurBaseline(Engine):
    """Our baseline of a rival's method: `baseline` is its name; it keeps as many keys as a job says (`count`)."""

    packages = ("moacompress", "transformers", "torch")

    def __init__(self, task: Job) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(task["threads"])
        wanted: Any = getattr(torch, task.get("dtype", "bfloat16"))
        self._model: Any = AutoModelForCausalLM.from_pretrained(task["dense"], dtype=wanted).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(task["dense"])
        self._baseline: Any = known_evictions()[task["baseline"]]()
        self.vocabulary = self._model.config.vocab_size

    def answer(self, job: Job) -> Job:
        """Is not asked for: `moacompress eval --against` has the answers of baselines."""
        raise NotImplementedError("answers of baselines are measured by moacompress eval --against")

    def turn(self, job: Job) -> Job:
        """Is not asked for: a baseline masks and frees nothing."""
        raise NotImplementedError("a baseline masks and frees nothing, so that there is no speed to measure")

    def kept(self, job: Job) -> Job:
        """As `Engine`."""
        with torch.inference_mode():
            prompt = read_prompt(self._model, self._tokenizer, job["prompt"]).until(len(job["prompt"]))
            scores = self._baseline.scores(prompt, self._baseline.prepare(prompt))
            mask = self._baseline.allocate(scores, job["count"], 1)
        return {"kept": [[row.nonzero()[:, 0].tolist() for row in layer] for layer in mask]}


def make(task: Job) -> Engine:
    """Returns the engine of a checkpoint, or of a baseline."""
    return OurBaseline(task) if "baseline" in task else Ours(task)
