"""OpenVINO GenAI: the `.gguf` file as it is, with a cache of 16, 8 or 4 bits, or blocks evicted down to a number of tokens.

It runs a prompt and its answer as one request, so that there is no cutting a prompt before its question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rivals.runners.engine import Engine, Job, random_ids

BLOCK = 32
"""Tokens of a block of its cache on a CPU."""
START, RECENT = 32, 128
"""Tokens at the beginning and at the end that its eviction keeps in any case."""


class OpenVino(Engine):
    """A pipeline: `precision` is of the cache; `tokens_kept`, where there is one, what eviction leaves."""

    packages = ("openvino-genai", "openvino")

    def __init__(self, task: Job) -> None:
        import openvino
        import openvino_genai

        self._openvino, self._genai = openvino, openvino_genai
        blocks = -(-task["tokens"] // BLOCK) + 2
        plan = openvino_genai.SchedulerConfig()
        plan.cache_size, plan.num_kv_blocks = 0, blocks
        plan.enable_prefix_caching = False
        if "tokens_kept" in task:
            plan.use_cache_eviction = True
            mode = openvino_genai.AggregationMode.NORM_SUM
            plan.cache_eviction_config = openvino_genai.CacheEvictionConfig(START, RECENT, task["tokens_kept"], mode)
        options = {"KV_CACHE_PRECISION": task["precision"], "INFERENCE_NUM_THREADS": task["threads"]}
        self._pipeline: Any = openvino_genai.ContinuousBatchingPipeline(task["gguf"], plan, "CPU", options)
        self.vocabulary = task["vocabulary"]

    def answer(self, job: Job) -> Job:
        """As `Engine`; the bytes are those of the blocks in use at the end."""
        if job["question_at"] is not None:
            raise SystemExit("OpenVINO reads a prompt with its question")
        found = self._generate(job["prompt"], job["new_tokens"], set(job["stop"]))
        metrics = self._pipeline.get_metrics()
        held = round(metrics.kv_cache_size_in_bytes * metrics.cache_usage / 100)
        return {"ids": [int(token) for token in found.m_generation_ids[0]], "kv_bytes": held, "masked_bytes": 0}

    def turn(self, job: Job) -> Job:
        """As `Engine`, but the step is the mean of all, by its own clock."""
        ids = random_ids(job, self.vocabulary)
        clock = self._generate(ids[: job["length"]], job["steps"] + 1, None).perf_metrics
        return {"prompt_ms": clock.get_ttft().mean, "step_ms": clock.get_tpot().mean}

    def _generate(self, ids: Sequence[int], new_tokens: int, stop: set[int] | None) -> Any:
        """Generates greedily; without `stop` all the tokens that were asked for."""
        import numpy as np

        wanted = self._genai.GenerationConfig()
        wanted.do_sample, wanted.max_new_tokens, wanted.ignore_eos = False, new_tokens, stop is None
        if stop:
            wanted.eos_token_id, wanted.stop_token_ids = min(stop), stop
        (found,) = self._pipeline.generate([self._openvino.Tensor(np.array([ids]))], [wanted])
        return found


make = OpenVino
