"""Tests that run vLLM's engine in this process: `make test-vllm` has the environment for them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

if TYPE_CHECKING:
    from vllm import LLM

    from moacompress.rules.plan import Plan

VOCABULARY = 160
NAN = 255
"""A byte: of such, all native numbers and all scales of codes are NaN."""
WIDTH = 32
"""Numbers of a head: the smallest that vLLM's own attention on CPUs knows."""


@dataclass(frozen=True)
class Answer:
    """What the engine said.

    Attributes:
        prompt: token ids.
        tokens: what it went on with.
        logprobs: of these.
        cached: tokens of the prompt that were in the prefix cache.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    cached: int


class Engine:
    """A `LLM` for token ids."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def ask(self, prompts: Sequence[list[int]], new: int = 12, together: bool = True) -> list[Answer]:
        """Returns greedy answers, to all prompts at once or to one after the other."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=0, detokenize=False)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        batches = [given] if together else [[one] for one in given]
        outputs = [out for batch in batches for out in self.llm.generate(batch, params, use_tqdm=False)]
        found = []
        for out in outputs:
            tokens = list(out.outputs[0].token_ids)
            logprobs = [at[token].logprob for at, token in zip(out.outputs[0].logprobs, tokens, strict=True)]
            found.append(Answer(list(out.prompt_token_ids), tokens, logprobs, out.num_cached_tokens or 0))
        return found

    @property
    def core(self) -> Any:
        """The engine's core, where it is in this process."""
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def managers(self) -> Any:
        """What frees the blocks of each class."""
        return self.core.scheduler.kv_cache_manager.coordinator.single_type_managers

    @property
    def layers(self) -> dict[str, Any]:
        """vLLM's layers, classes among them, by name."""
        found: dict[str, Any] = self.llm.llm_engine.vllm_config.compilation_config.static_forward_context
        return found


@pytest.fixture
def engine() -> Iterator[Callable[..., Engine]]:
    """Returns a function that serves a folder; options are those of `LLM`."""
    made = []

    def make(folder: Path, **options: Any) -> Engine:
        from vllm import LLM

        settings: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "kv_cache_memory_bytes": 24 << 20,
            "max_model_len": 2048,
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
            "seed": 0,
            **options,
        }
        made.append(LLM(str(folder), **settings))
        return Engine(made[-1])

    yield make
    while made:
        made.pop().llm_engine.engine_core.shutdown()
    gc.collect()
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills memory with NaN when it is made and blocks when they are freed; returns the numbers of those freed."""
    from vllm.v1.core.block_pool import BlockPool

    from moacompress.serving.vllm.layer_memory import LayerMemory

    memories, freed = list[Any](), list[int]()
    patch_points, free_blocks = LayerMemory.of, BlockPool.free_blocks

    def of(layer: int, classes: Any, rules: Any) -> Any:
        for one in classes if not memories else []:
            memories.append(one.kv_cache)
            one.kv_cache.fill_(NAN)
        return patch_points(layer, classes, rules)

    def free(pool: BlockPool, blocks: Any, *args: Any, **kwargs: Any) -> Any:
        blocks = list(blocks)
        found = free_blocks(pool, blocks, *args, **kwargs)
        for block in blocks:
            if block.ref_cnt == 0 and not block.is_null and block.block_hash is None:
                freed.append(block.block_id)
                for memory in memories[:1]:  # all classes are in the same
                    memory[block.block_id] = NAN
        return found

    monkeypatch.setattr(LayerMemory, "of", staticmethod(of))
    monkeypatch.setattr(BlockPool, "free_blocks", free)
    return freed


@pytest.fixture
def preempted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the names of requests that are preempted, as they are."""
    from vllm.v1.core.sched.scheduler import Scheduler

    names = list[str]()
    preempt = Scheduler._preempt_request

    def count(self: Scheduler, request: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", count)
    return names


@pytest.fixture(scope="session")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any]
) -> Callable[..., tuple[Path, Any]]:
    """Returns a function that writes a checkpoint under a plan, or a dense one: its folder, and the model that it is of."""
    from moacompress.runtime import attach

    def write(plan_of: Callable[[Any], Plan] | None, family: str = "llama", **overrides: Any) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp("served") / "model"
        model = tiny_model(family, **{"hidden_size": 128, "head_dim": WIDTH, **overrides})
        if plan_of is not None:
            attach(model, plan_of(model))
        model.save_pretrained(folder)
        return folder, model

    return write


@pytest.fixture(scope="session")
def expected() -> Callable[[Any, Answer], list[float]]:
    """Returns a function that has transformers say the log-probabilities of an answer, all tokens at once, without a cache."""
    import torch

    def logprobs(model: Any, answer: Answer) -> list[float]:
        ids = torch.tensor([[*answer.prompt, *answer.tokens]])
        with torch.inference_mode():
            found = model(ids, use_cache=False).logits[0, len(answer.prompt) - 1 : -1].float().log_softmax(-1)
        return found[torch.arange(len(answer.tokens)), torch.tensor(answer.tokens)].tolist()

    return logprobs
